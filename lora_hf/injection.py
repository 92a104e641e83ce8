"""Finds the projections of a pretrained model, swaps them for LoRA layers, and takes them out again.

Every function changes the model in place and returns it, as `nn.Module.to` does. What is trainable, what is merged,
which adapters there are: all of it is asked of the modules, there is no second book-keeping.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_hf.architectures import ARCHITECTURES, Architecture
from lora_hf.config import PRESETS, LoraConfig
from lora_hf.errors import AdapterError, ConfigError, ModelError, did_you_mean
from lora_hf.layers import AdapterHead, LoraLinear, LoraWeights, features
from lora_hf.variants.biases import (
    BiasedModule,
    add_biases,
    biased_modules,
    check_no_bias_alone,
    free_biases,
    unwrap_biases,
)
from lora_hf.variants.embedding import check_not_tied, embeddings_path
from lora_hf.variants.patterns import chosen_layers, layer_of, numbers_of, path_expression
from lora_hf.variants.table import initialise, new_weights

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class Site:
    """A place to adapt: a module and, in a fused projection, the output columns `(start, stop)` that the role owns."""

    path: str
    role: str
    layout: Literal["linear", "conv1d", "embedding"]
    slice: tuple[int, int] | None = None


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: of the model as it runs, of what is trained, and of the active adapter's two parts."""

    total: int
    trainable: int
    lora: int
    head: int


def plan(model: PreTrainedModel, lora: LoraConfig) -> list[Site]:
    """The exact sites that `lora.targets` names in this model, in the order of its modules.

    Raises:
        ModelError: a role is asked for and the model type has no entry in the role table.
        ConfigError: a target that matches nothing here, or two targets that adapt the same columns; a layer that the
            model does not have.
    """
    prefix = _base_prefix(model)
    layers = adaptable(model)
    chosen = None if lora.layers is None else chosen_layers(lora.layers, layers)
    sites: list[Site] = []
    for target in dict.fromkeys(lora.targets):
        found = [site for pattern in _patterns(model, target) for site in _match(pattern, layers, prefix)]
        if not found:
            raise ConfigError(_no_match(target, model, layers, prefix))
        kept = [site for site in found if chosen is None or layer_of(site.path) in chosen]
        if not kept:
            raise ConfigError(
                f"lora.layers: target {target!r} has no module in the layers {_listed(map(str, lora.layers or ()))}"
            )
        sites += [site for site in kept if site not in sites]
    order = {path: index for index, path in enumerate(layers)}
    sites.sort(key=lambda site: (order[site.path], site.slice or (0, 0)))
    for before, site in pairwise(sites):
        if before.path == site.path and (before.slice is None or site.slice is None):
            raise ConfigError(
                f"lora.targets: {before.role} and {site.role} both adapt {site.path}; leave one of them out"
            )
    return sites


def inject(model: PreTrainedModel, lora: LoraConfig, name: str = "default") -> PreTrainedModel:
    """Swaps the planned projections for LoRA layers, gives the adapter its copy of the task head, freezes the rest.

    Raises:
        ModelError, ConfigError: as `plan`; also a rank above the smaller side of a projection.
        AdapterError: the model already has an adapter of that name, or the name cannot be one.
    """
    return inject_at(model, plan(model, lora), lora, name)


def inject_at(model: PreTrainedModel, sites: list[Site], lora: LoraConfig, name: str = "default") -> PreTrainedModel:
    """`inject` at sites that are already planned, by `plan` with the same `lora`."""
    start = "" if lora.init_lora_weights in ("default", "gaussian") else lora.init_lora_weights
    if (start or lora.use_dora) and any(site.layout == "embedding" for site in sites):
        raise ConfigError(
            "lora.targets: embeddings take neither lora.use_dora nor a start (pissa, olora); leave them out"
        )
    if start and lora.use_dora:
        raise ConfigError(f"lora.use_dora: not together with lora.init_lora_weights={start}; choose one of them")
    numbers = numbers_of(sites, adaptable(model), lora, _base_prefix(model))
    check_new_name(model, name)
    check_no_bias_alone(model, numbers)
    biases = free_biases(model, numbers, head_paths(model)) if lora.bias == "all" else {}
    variant = (lora.use_rslora, lora.use_dora, start, lora.bias != "none")
    for path, (columns, r, alpha) in numbers.items():
        weights = add_weights(model, path, name, columns, r, alpha, lora.lora_dropout, *variant)
        initialise(weights, model.get_submodule(path), lora.init_lora_weights)  # type: ignore[arg-type]
    add_biases(model, biases, name)
    return inject_head(model, name)


def inject_head(model: PreTrainedModel, name: str = "default") -> PreTrainedModel:
    """Gives adapter `name` its own copy of the task head, makes it the active one and freezes everything else."""
    for path in head_paths(model):
        module = model.get_submodule(path)
        if not isinstance(module, AdapterHead):
            model.set_submodule(path, module := AdapterHead(module))
        if name not in module.heads:
            module.add(name)
    set_adapter(model, name)
    mark_only_lora_as_trainable(model)
    for head in adapter_heads(model).values():
        head.heads[name].requires_grad_(True)
    return model


def add_weights(
    model: PreTrainedModel,
    path: str,
    name: str,
    slices: list[tuple[int, int]],
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    start: str = "",
    bias: bool = False,
) -> LoraWeights:
    """Puts fresh A and B of adapter `name` at one projection, which becomes a LoRA layer if it is not one yet."""
    module = model.get_submodule(path)
    if not isinstance(module, LoraLinear):
        model.set_submodule(path, module := LoraLinear(module))
    weights = new_weights(module, slices, r, lora_alpha, lora_dropout, use_rslora, use_dora, start, bias)
    module.adapters[name] = weights.train(module.training)
    return weights


def eject(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the plain model back: its own projections and head, or, after `merge`, the merged ones.

    What `inject` froze stays frozen.
    """
    layers = lora_layers(model)
    merged = any(layer.merged for layer in layers.values())
    for path, layer in layers.items():
        model.set_submodule(path, layer.base_layer)
    unwrap_biases(model, keep=merged)
    for path, head in adapter_heads(model).items():
        model.set_submodule(path, head.heads[head.active] if merged and head.active else head.base_head)
    return model


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Adds the active adapter to the base weights (in fp32, rounded once); doing it again changes nothing.

    Raises:
        AdapterError: the adapter is on embeddings that are tied to the output head.
    """
    check_not_tied(model)
    for layer in lora_layers(model).values():
        layer.merge()
    return model


def unmerge(model: PreTrainedModel) -> PreTrainedModel:
    """Restores the base weights bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    return model


def set_adapter(model: PreTrainedModel, name: str | None) -> PreTrainedModel:
    """Makes adapter `name` the active one; None runs the bare base.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    known = adapter_names(model)
    if name is not None and name not in known:
        raise AdapterError(f"no adapter {name!r} on this model{did_you_mean(name, known)}; it has: {_listed(known)}")
    for layer in lora_layers(model).values():
        layer.unmerge()
        layer.active = name if name is not None and name in layer.adapters else None
    for module in biased_modules(model).values():
        module.active = name if name is not None and name in module.adapters else None
    for head in adapter_heads(model).values():
        head.active = name if name is not None and name in head.heads else None
    return model


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every LoRA layer by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_heads(model: nn.Module) -> dict[str, AdapterHead]:
    """Every adapted head by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterHead)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters on the model, in the order they came."""
    places = [layer.adapters for layer in lora_layers(model).values()]
    places += [head.heads for head in adapter_heads(model).values()]
    return list(dict.fromkeys(name for place in places for name in place))


def head_paths(model: PreTrainedModel) -> list[str]:
    """The top-level modules that make the model's classification head; none where it has no such head."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    return [path for path in architecture.head if hasattr(model, path)] if architecture else []


def check_new_name(model: nn.Module, name: str) -> None:
    """Raises AdapterError where `name` is taken, or cannot name a submodule."""
    if name in adapter_names(model):
        raise AdapterError(f"the model already has an adapter named {name!r}; choose another name")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"{name!r} cannot name an adapter: expected a word without dots that torch does not use")


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> nn.Module:
    """Freezes all but the active adapters' A and B, and the biases asked for; as loralib, it freezes the head."""
    model.requires_grad_(False)
    for parameter in _lora_parameters(model, bias).values():
        parameter.requires_grad_(True)
    return model


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, torch.Tensor]:
    """The active adapters' A and B, and the biases asked for, by their names in `model.state_dict()`; as loralib."""
    return {name: parameter.detach() for name, parameter in _lora_parameters(model, bias).items()}


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts the parameters, those that tied modules share once; trained biases belong to LoRA."""
    places = [*lora_layers(model).values(), *biased_modules(model).values()]
    weights = [place.adapters[place.active] for place in places if place.active]
    heads = [head.heads[head.active] for head in adapter_heads(model).values() if head.active]
    idle = [place[name] for place, active in _places(model) for name in place if name != active]
    total = _count(model)
    return ParameterCounts(
        total=total - sum(map(_count, idle)),
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        lora=sum(map(_count, weights)),
        head=sum(map(_count, heads)),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _places(model: nn.Module) -> Iterator[tuple[nn.ModuleDict, str | None]]:
    for place in [*lora_layers(model).values(), *biased_modules(model).values()]:
        yield place.adapters, place.active
    for head in adapter_heads(model).values():
        yield head.heads, head.active


def _lora_parameters(model: nn.Module, bias: Bias) -> dict[str, nn.Parameter]:
    if bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"bias: expected one of none, all, lora_only, found {bias!r}")
    layers = lora_layers(model)
    chosen = {
        parameter
        for place in [*layers.values(), *biased_modules(model).values()]
        if place.active
        for parameter in place.adapters[place.active].parameters()
    }
    if bias == "lora_only":
        chosen |= {layer.bias for layer in layers.values() if layer.active and layer.bias is not None}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter in chosen or (bias == "all" and name.rpartition(".")[2] == "bias")
    }


def _base_prefix(model: PreTrainedModel) -> str:
    """`"roberta."` in a model with a head, nothing in the base model itself."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D by its path, the ones inside a LoRA layer under the path of that layer."""
    return {path: layer for path, layer in adaptable(model).items() if not isinstance(layer, nn.Embedding)}


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear, Conv1D and nn.Embedding by its path; one inside a LoRA layer by the path of that layer."""
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            layers[path] = module.base_layer
        elif isinstance(module, BiasedModule):
            layers |= {path: module.base_layer} if isinstance(module.base_layer, (nn.Linear, Conv1D)) else {}
        elif isinstance(module, (nn.Linear, Conv1D)) or type(module) is nn.Embedding:  # some of its children scale
            layers |= {} if path.rpartition(".")[0] in layers else {path: module}
    return layers


@dataclass(frozen=True)
class _Pattern:
    role: str
    path: str
    slice: tuple[int, int] = (0, 1)


def _patterns(model: PreTrainedModel, target: str) -> list[_Pattern]:
    """What to look for: one pattern for a role or a path, one for each role that the model has for a preset."""
    if "." in target or target == "embeddings":
        return [_Pattern(target, target if "." in target else embeddings_path(model))]
    table = _architecture(model).projections
    roles = [role for role in PRESETS.get(target, (target,)) if role in table]
    return [_Pattern(role, table[role].path, table[role].slice) for role in roles]


def _architecture(model: PreTrainedModel) -> Architecture:
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"model type {kind!r} has no entry in the role table (lora_hf/architectures.py); it has: "
            f"{_listed(ARCHITECTURES)}. Name modules by path instead: lora.targets='[encoder.layer.*.attention.query]'"
        )
    return ARCHITECTURES[kind]


def _match(pattern: _Pattern, layers: dict[str, nn.Module], prefix: str) -> Iterator[Site]:
    expression = path_expression(pattern.path, prefix)
    index, count = pattern.slice
    for path, layer in layers.items():
        if expression.fullmatch(path):
            width = features(layer)[1] // count
            columns = None if count == 1 else (index * width, (index + 1) * width)
            layout = (
                "embedding" if isinstance(layer, nn.Embedding) else "conv1d" if isinstance(layer, Conv1D) else "linear"
            )
            yield Site(path, pattern.role, layout, columns)


def _no_match(target: str, model: PreTrainedModel, layers: dict[str, nn.Module], prefix: str) -> str:
    kind = model.config.model_type
    if "." not in target:
        return f"lora.targets: {kind} has no role {target!r}; it has: {_listed(_architecture(model).projections)}"
    templates = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", path.removeprefix(prefix)) for path in layers)
    near = did_you_mean(target, templates, count=3)
    return f"lora.targets: no nn.Linear, Conv1D or nn.Embedding of this {kind} matches {target!r}{near}; it has: " + (
        _listed(templates)
    )


def _listed(names: object) -> str:
    return ", ".join(names) or "none"  # type: ignore[arg-type]
