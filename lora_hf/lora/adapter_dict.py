"""The container for the adapters of a module, and a walk over a model that skips it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from lora_hf.lora.precision import keep_dtype


class AdapterDict(nn.ModuleDict):
    """The weights that each adapter adds to one module, by adapter name. They stay fp32 when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterDict:
        return super()._apply(keep_dtype(fn), recurse)


def modules_of_base(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the modules of adapters. With eight adapters, those are the majority."""

    def walk(path: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        if remove_duplicate:
            seen.add(module)
        yield path, module
        for name, child in module._modules.items():  # `named_children` would leave out a child with two names
            if child is not None and not isinstance(child, AdapterDict):
                yield from walk(f"{path}.{name}" if path else name, child, seen)

    return walk("", model, set())
