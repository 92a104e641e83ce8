"""Trained biases, `bias: lora_only` and `bias: all` of PEFT and loralib, an fp32 copy for each adapter.

A module's output becomes `f(x) + (b - b_0)` with the copy b and the base's own bias b_0. The base keeps its bias, so
other adapters and the bare base give the same as before, and a base in bf16 does not round the steps of training.

At an adapted projection the copy belongs to its LoRA weights (`LoraWeights.bias`). `all` also trains the biases of all
other projections and norms outside the task head, which is trained anyway: a `BiasedModule` replaces each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_hf.core.errors import AdapterError, ModelError
from lora_hf.lora.active_adapter import AdapterState
from lora_hf.lora.adapter_dict import modules_of_base
from lora_hf.lora.layers import AdaptedModule, LoraLinear
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.quantization import QuantisedLinear

AFFINE = (nn.Linear, Conv1D, QuantisedLinear, nn.LayerNorm)  # modules that add their bias last


class Bias(nn.Module):
    """The fp32 bias of one adapter at one module; it starts as the module's own."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(start.detach().float().clone())


class BiasedModule(AdaptedModule):
    """A module with a trained `Bias` per adapter; without an active adapter it is the module itself."""

    def forward(self, x: Tensor) -> Tensor:
        y, routing, active = self.base_layer(x), self.adapter_state.routing, self.active
        if routing is not None:
            return routing.apply(y, x, lambda name, _, items: self._add(name, items), self.adapters)
        return y if active is None else self._add(active, y)

    def _add(self, name: str, y: Tensor) -> Tensor:
        return y + (self.adapters[name].bias - self.bias).to(y.dtype)


def biased_modules(model: nn.Module) -> dict[str, BiasedModule]:
    """Every module of which an adapter trains the bias alone, by its path."""
    return {path: module for path, module in modules_of_base(model) if isinstance(module, BiasedModule)}


def unadapted_biases(model: nn.Module, adapted: Iterable[str], heads: Iterable[str]) -> dict[str, nn.Module]:
    """The plain modules, by path, whose bias `all` trains besides those of the adapted paths.

    Args:
        adapted: the paths to which the adapter adds A and B.
        heads: the paths of the task head.

    Raises:
        ModelError: a module does not simply add its bias to its output.
        AdapterError: another adapter has A and B at one of the modules.
    """
    adapted, in_heads = set(adapted), tuple(f"{head}." for head in heads)
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if f"{path}.".startswith(in_heads) or ".adapters." in path or path in adapted or parent in (*adapted, *modules):
            continue
        plain = module.base_layer if isinstance(module, AdaptedModule) else module
        if getattr(plain, "bias", None) is None or isinstance(module, ModulesToSaveWrapper):
            continue
        if not isinstance(plain, AFFINE):
            raise ModelError(
                f"lora.bias=all: {path} is a {type(plain).__name__}, which does not simply add its bias; expected a "
                "projection or a LayerNorm. Use lora.bias=lora_only"
            )
        if isinstance(module, LoraLinear):
            raise AdapterError(
                f"lora.bias=all: {path} has A and B of another adapter, and this adapter would train its bias alone; "
                "put the two adapters on separate models"
            )
        modules[path] = plain
    return modules


def check_no_standalone_biases(model: nn.Module, adapted: Iterable[str]) -> None:
    """Raises AdapterError if another adapter trains the bias alone of a projection that is to get A and B."""
    biased = biased_modules(model)
    for path in adapted:
        if path in biased:
            raise AdapterError(
                f"{path}: adapter {next(iter(biased[path].adapters))!r} trains its bias alone (bias: all), so no other "
                "adapter can have A and B there; put the two adapters on separate models"
            )


def add_biases(model: nn.Module, modules: dict[str, nn.Module], name: str, adapter_state: AdapterState) -> None:
    """Gives adapter `name` a copy of the bias of each of `unadapted_biases`."""
    for path, plain in modules.items():
        module = model.get_submodule(path)
        if not isinstance(module, BiasedModule):
            model.set_submodule(path, module := BiasedModule(plain, adapter_state))
        module.adapters[name] = Bias(module.bias)


def standalone_biases(model: nn.Module, name: str, prefix: str) -> dict[str, nn.Parameter]:
    """The biases that adapter `name` trains without A and B, by their names in a file."""
    modules = {path: module for path, module in biased_modules(model).items() if name in module.adapters}
    return {f"{prefix}{path}.bias": module.adapters[name].bias for path, module in modules.items()}


@torch.no_grad()
def load_standalone_biases(model: nn.Module, name: str, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Loads the `standalone_biases` from the tensors of a file."""
    for key, bias in standalone_biases(model, name, prefix).items():
        bias.copy_(tensors[key])


@torch.no_grad()
def unwrap_biases(model: nn.Module, keep: bool) -> None:
    """Restores the plain modules; `keep` leaves the active adapter's biases in them, in the base's precision."""
    for path, module in biased_modules(model).items():
        if keep and module.active:
            module.bias.copy_(module.adapters[module.active].bias)
        model.set_submodule(path, module.base_layer)
