"""What adapters add to a module, and the walk over a model that leaves it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from lora_hf.lora.precision import keep_dtype


class AdapterDict(nn.ModuleDict):
    """What each adapter adds to one module, by the adapter's name: fp32, whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterDict:
        return super()._apply(keep_dtype(fn), recurse)


def modules_of_base(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without what adapters add: with eight of them on a model, that is most of its modules."""

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
