"""Finds the transformers model in what users wrap around it, or refuses the wrapper by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from lora_hf.core.errors import ModelError

F = TypeVar("F", bound=Callable[..., Any])
PARALLEL = (DataParallel, DistributedDataParallel)


def unwrap_model(model: Any, changes: bool = False) -> PreTrainedModel:
    """The transformers model inside `model`.

    Args:
        changes: the caller replaces modules, which a wrapper that has already recorded them would not notice.

    Raises:
        ModelError: there is no such model, more than one, or a wrapper that cannot be seen through.
    """
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a model of transformers, found {kind}")
    inner = dict(model.named_children()).get("_orig_mod")  # of torch.compile
    if inner is None and isinstance(model, PARALLEL):
        inner = model.module
    if inner is not None:
        if changes:
            wrapper = kind if isinstance(model, PARALLEL) else "torch.compile"
            raise ModelError(f"{wrapper} has wrapped this model; change the plain model first, and wrap it again")
        return unwrap_model(inner)
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{kind} is a model of PEFT: save its adapter with save_pretrained, and load it here with load_adapter "
            "onto the plain base"
        )
    found: list[PreTrainedModel] = []
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not path.startswith(tuple(f"{outer}." for outer in paths)):
            found.append(module)
            paths.append(path)
    if len(found) != 1:
        listed = f"{len(found)} of them ({', '.join(paths)})" if found else "none"
        raise ModelError(f"{kind}: expected a model of transformers, or a module that holds one; found {listed}")
    return found[0]


def on_unwrapped_model(changes: bool = True) -> Callable[[F], F]:
    """A function of a model that also takes wrappers; it returns the wrapper where it would return the model."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(model: Any, *arguments: Any, **named: Any) -> Any:
            inner = unwrap_model(model, changes)
            result = function(inner, *arguments, **named)
            return model if result is inner else result

        return call  # type: ignore[return-value]

    return decorate
