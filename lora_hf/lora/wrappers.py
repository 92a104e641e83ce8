"""Finds the transformers model inside a wrapper (DDP, torch.compile), or raises an error that names the wrapper."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from lora_hf.core.errors import ModelError
from lora_hf.lora.adapter_dict import modules_of_base

F = TypeVar("F", bound=Callable[..., Any])
PARALLEL = (DataParallel, DistributedDataParallel)


def unwrap_model(model: Any, changes: bool = False) -> PreTrainedModel:
    """The transformers model inside `model`.

    Args:
        changes: the caller replaces modules. Wrappers that have already recorded the modules are then refused.

    Raises:
        ModelError: there is no transformers model, there are several, or the wrapper is not supported.
    """
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        if changes:
            _check_plain(model)
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a transformers model, found {kind}")
    inner = _compiled_from(model)
    if inner is None and isinstance(model, PARALLEL):
        inner = model.module
    if inner is not None:
        if changes:
            wrapper = kind if isinstance(model, PARALLEL) else "torch.compile"
            raise ModelError(f"{wrapper} has wrapped this model; change the plain model first, and wrap it again")
        return unwrap_model(inner)
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{kind} is a model of PEFT: save its adapter with save_pretrained, then load it onto the plain base with "
            "load_adapter"
        )
    found: list[PreTrainedModel] = []
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not path.startswith(tuple(f"{outer}." for outer in paths)):
            found.append(module)
            paths.append(path)
    if len(found) != 1:
        listed = f"{len(found)} of them ({', '.join(paths)})" if found else "none"
        raise ModelError(f"{kind}: expected a transformers model, or a module that holds one; found {listed}")
    return found[0]


def _compiled_from(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of torch.compile; None for any other module."""
    return dict(module.named_children()).get("_orig_mod")


def _check_plain(model: PreTrainedModel) -> None:
    """Raises ModelError if something inside the model has been adapted by PEFT or compiled."""
    for path, module in modules_of_base(model):
        if type(module).__module__.startswith("peft."):
            raise ModelError(
                f"{path} is adapted by PEFT already. Load the plain base, then PEFT's adapter with load_adapter"
            )
        if _compiled_from(module) is not None:
            raise ModelError(
                f"torch.compile has wrapped {path}; change the plain model first, and compile {path} again"
            )


@contextlib.contextmanager
def _without_compiled_parts(model: PreTrainedModel) -> Iterator[None]:
    """Temporarily replaces compiled submodules with the originals, so that module paths are the plain ones."""
    compiled = {path: module for path, module in model.named_modules() if _compiled_from(module) is not None}
    for path, module in reversed(compiled.items()):
        model.set_submodule(path, _compiled_from(module))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for path, module in compiled.items():
            model.set_submodule(path, module)


def on_unwrapped_model(changes: bool = True, plain_paths: bool = False) -> Callable[[F], F]:
    """Lets a function of a model accept wrapped models too. It then returns the wrapper instead of the model.

    Args:
        plain_paths: compiled submodules are unwrapped while it runs.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(model: Any, *arguments: Any, **named: Any) -> Any:
            inner = unwrap_model(model, changes)
            with _without_compiled_parts(inner) if plain_paths else contextlib.nullcontext():
                result = function(inner, *arguments, **named)
            return model if result is inner else result

        return call  # type: ignore[return-value]

    return decorate
