"""Trained biases, PEFT's and loralib's `bias: lora_only` and `bias: all`, an fp32 copy for each adapter.

What is added to a module's output is the copy less the base's own bias: `f(x) + (b - b_0)`. The base keeps its bias, so
that other adapters and the bare base answer as before, and a base in bf16 does not round the steps of training.

At an adapted projection the copy belongs to its LoRA weights (`LoraWeights.bias`). `all` also trains the biases of all
other projections and norms, outside the task head, which is trained whole: `BiasedModule` stands in for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_hf.core.errors import AdapterError, ModelError
from lora_hf.lora.active_adapter import AdapterState
from lora_hf.lora.layers import AdaptedModule, LoraLinear
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.precision import keep_dtype

AFFINE = (nn.Linear, Conv1D, nn.LayerNorm)  # their bias is added to the output last


class Bias(nn.Module):
    """The fp32 bias of one adapter at one module; it starts as the module's own."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(start.detach().float().clone())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Bias:
        return super()._apply(keep_dtype(fn), recurse)


class BiasedModule(AdaptedModule):
    """A module with a trained `Bias` per adapter; without an active adapter it is the module itself."""

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, mixture, active = self.base_layer(x), self.switch.routing, self.active
        if mixture is None:
            return y if active is None else y + self._step(active, y)
        return mixture.apply(y, x, lambda name, _, rows: rows + self._step(name, rows), self.adapters)

    def _step(self, name: str, y: torch.Tensor) -> torch.Tensor:
        return (self.adapters[name].bias - self.bias).to(y.dtype)


def biased_modules(model: nn.Module) -> dict[str, BiasedModule]:
    """Every module that trains a bias alone, by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BiasedModule)}


def unadapted_biases(model: nn.Module, adapted: Iterable[str], heads: Iterable[str]) -> dict[str, nn.Module]:
    """The modules whose bias `all` trains beside those of the adapted paths, as they are in the plain model.

    Args:
        adapted: the paths that the adapter puts A and B at.
        heads: the paths of the task head.

    Raises:
        ModelError: a bias that is not simply added to its module's output.
        AdapterError: a place where another adapter has A and B.
    """
    adapted, skipped = set(adapted), tuple(f"{head}." for head in heads)
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = path.rpartition(".")[0]
        if f"{path}.".startswith(skipped) or ".adapters." in path or path in adapted or inside in (*adapted, *found):
            continue
        plain = module.base_layer if isinstance(module, (BiasedModule, LoraLinear)) else module
        if getattr(plain, "bias", None) is None or isinstance(module, ModulesToSaveWrapper):
            continue
        if not isinstance(plain, AFFINE):
            raise ModelError(
                f"lora.bias=all: {path}, a {type(plain).__name__}, does not simply add its bias; expected a projection "
                "or a LayerNorm. Use lora.bias=lora_only"
            )
        if isinstance(module, LoraLinear):
            raise AdapterError(
                f"lora.bias=all: another adapter has A and B at {path}, where this one would train the bias alone; put "
                "them on models of their own"
            )
        found[path] = plain
    return found


def check_no_standalone_biases(model: nn.Module, adapted: Iterable[str]) -> None:
    """Raises AdapterError where another adapter trains the bias alone of a projection that is to get A and B."""
    taken = biased_modules(model)
    for path in adapted:
        if path in taken:
            raise AdapterError(
                f"{path}: adapter {next(iter(taken[path].adapters))!r} trains the bias alone of it (bias: all); put an "
                "adapter with A and B there on a model of its own"
            )


def add_biases(model: nn.Module, modules: dict[str, nn.Module], name: str, switch: AdapterState) -> None:
    """Gives adapter `name` its copy of the bias of each of `unadapted_biases`."""
    for path, plain in modules.items():
        module = model.get_submodule(path)
        if not isinstance(module, BiasedModule):
            model.set_submodule(path, module := BiasedModule(plain, switch))
        module.adapters[name] = Bias(module.bias)


def standalone_biases(model: nn.Module, name: str, prefix: str) -> dict[str, nn.Parameter]:
    """The biases that adapter `name` trains without A and B beside them, by their names in a file."""
    modules = {path: module for path, module in biased_modules(model).items() if name in module.adapters}
    return {f"{prefix}{path}.bias": module.adapters[name].bias for path, module in modules.items()}


@torch.no_grad()
def load_standalone_biases(model: nn.Module, name: str, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Takes `standalone_biases` from the tensors of a file."""
    for key, bias in standalone_biases(model, name, prefix).items():
        bias.copy_(tensors[key])


@torch.no_grad()
def unwrap_biases(model: nn.Module, keep: bool) -> None:
    """Puts the plain modules back; `keep` leaves the active adapter's biases in them, in the base's precision."""
    for path, module in biased_modules(model).items():
        if keep and module.active:
            module.bias.copy_(module.adapters[module.active].bias)
        model.set_submodule(path, module.base_layer)
