"""Finds the projections of a pretrained model, swaps them for LoRA layers, and takes them out again.

Every function changes the model in place and returns it, as `nn.Module.to` does. What is trainable, what is merged,
which adapters there are: all of it is asked of the modules, there is no second book-keeping.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError, did_you_mean
from lora_hf.lora.active_adapter import STATE_ATTRIBUTE, AdapterState, Labels
from lora_hf.lora.layers import Drift, LoraLinear, LoraWeights
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.quantization import QuantisedLinear
from lora_hf.lora.target_modules import (
    Site,
    adaptable_modules,
    base_prefix,
    comma_separated,
    head_paths,
    plan,
    ranks_and_alphas,
)
from lora_hf.lora.variants.biases import (
    add_biases,
    biased_modules,
    check_no_standalone_biases,
    unadapted_biases,
    unwrap_biases,
)
from lora_hf.lora.variants.embedding import check_not_tied
from lora_hf.lora.variants.table import PLAIN, Variant, initialise, new_weights

logger = logging.getLogger(__name__)

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: of the model as it runs, of what is trained, and of the active adapter's two parts."""

    total: int
    trainable: int
    lora: int
    head: int


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
    numbers = ranks_and_alphas(sites, adaptable_modules(model), lora, base_prefix(model))
    check_new_name(model, name)
    check_no_standalone_biases(model, numbers)
    biases = unadapted_biases(model, numbers, head_paths(model)) if lora.bias == "all" else {}
    variant = Variant(lora.use_rslora, lora.use_dora, start, lora.bias != "none")
    for path, (columns, r, alpha) in numbers.items():
        weights = add_weights(model, path, name, columns, r, alpha, lora.lora_dropout, variant)
        initialise(weights, model.get_submodule(path), lora.init_lora_weights)  # type: ignore[arg-type]
    add_biases(model, biases, name, adapter_state(model))
    return inject_head(model, name)


def inject_head(
    model: PreTrainedModel, name: str = "default", heads: Mapping[str, nn.Module] | None = None
) -> PreTrainedModel:
    """Gives adapter `name` its own copy of the task head, makes it the active one and freezes everything else.

    Args:
        heads: the adapter's own, by path; else copies of the base's.
    """
    switch = adapter_state(model)
    switch.names.setdefault(name)
    for path in head_paths(model):
        module = model.get_submodule(path)
        if not isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(path, module := ModulesToSaveWrapper(module, switch))
        if name not in module.modules_to_save:
            module.add(name, heads[path] if heads else None)
            switch.labels.setdefault(name, get_labels(model))
    set_adapter(model, name)
    mark_only_lora_as_trainable(model)
    for head in adapter_heads(model).values():
        head.modules_to_save[name].requires_grad_(True)
    return model


def add_weights(
    model: PreTrainedModel,
    path: str,
    name: str,
    slices: list[tuple[int, int]],
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    variant: Variant = PLAIN,
) -> LoraWeights:
    """Puts fresh A and B of adapter `name` at one projection, which becomes a LoRA layer if it is not one yet."""
    module, switch = model.get_submodule(path), adapter_state(model)
    if not isinstance(module, LoraLinear):
        model.set_submodule(path, module := LoraLinear(module, switch))
    switch.names.setdefault(name)
    weights = new_weights(module, slices, r, lora_alpha, lora_dropout, variant)
    module.adapters[name] = weights.train(module.training)
    return weights


def eject(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the plain model back: its own projections and head, or, after `merge`, the merged ones.

    What `inject` froze stays frozen, except the head.
    """
    layers = lora_layers(model)
    merged = any(layer.merged for layer in layers.values())
    for path, layer in layers.items():
        model.set_submodule(path, layer.base_layer)
    unwrap_biases(model, keep=merged)
    for path, head in adapter_heads(model).items():
        chosen = head.modules_to_save[head.active] if merged and head.active else head.original_module
        model.set_submodule(path, chosen.requires_grad_(True))
    if hasattr(model.base_model, STATE_ATTRIBUTE):
        delattr(model.base_model, STATE_ATTRIBUTE)
    return model


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Adds the active adapter to the base weights (in fp32, rounded once); doing it again changes nothing.

    A quantised base rounds coarsely: what is lost goes to the log, and `merge_drift` tells it by module.

    Raises:
        AdapterError: it adapts a weight that the input embeddings and the output head share, which would change both.
            Nothing is merged then.
    """
    check_not_tied(model)
    for layer in lora_layers(model).values():
        layer.merge()
    drifts = merge_drift(model).values()
    if drifts:
        logger.warning(
            "merged into a quantised base: rounding moved the weights by up to %.2g of their size, which is up to %.2g "
            "of the adapter's; dequantise(model) before merge keeps both, unmerge(model) takes it back",
            max(drift.of_weight for drift in drifts),
            max(drift.of_delta for drift in drifts),
        )
    return model


def merge_drift(model: nn.Module) -> dict[str, Drift]:
    """What rounding took from each projection that is merged into a quantised weight, by its path."""
    return {path: layer.drift for path, layer in lora_layers(model).items() if layer.drift}


def unmerge(model: PreTrainedModel) -> PreTrainedModel:
    """Restores the base weights bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    adapter_state(model).merged = False
    return model


def set_adapter(model: PreTrainedModel, name: str | None) -> PreTrainedModel:
    """Makes adapter `name` the active one, for all threads that have chosen none for themselves; None: the bare base.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    switch = adapter_state(model)
    check_adapter_exists(switch, name)
    if switch.merged:
        unmerge(model)
    if switch.labels:
        switch.labels[switch.active_adapter] = get_labels(model)  # somebody may have named them meanwhile
        set_labels(model, switch.labels.get(name, switch.labels[None]))
    switch.active_adapter = name
    return model


def adapter_state(model: PreTrainedModel) -> AdapterState:
    """The switch that all layers and heads of the model share; a plain model gets its own."""
    base = model.base_model
    if not hasattr(base, STATE_ATTRIBUTE):
        switch = AdapterState()
        if head_paths(model):
            switch.labels[None] = get_labels(model)
        setattr(base, STATE_ATTRIBUTE, switch)
    return getattr(base, STATE_ATTRIBUTE)


def check_adapter_exists(switch: AdapterState, name: str | None) -> None:
    """Raises AdapterError where the model has no adapter of that name; None is the bare base."""
    if name is not None and name not in switch.names:
        known = list(switch.names)
        raise AdapterError(
            f"no adapter {name!r} on this model{did_you_mean(name, known)}; it has: {comma_separated(known)}"
        )


def get_labels(model: PreTrainedModel) -> Labels:
    """The names of the model's labels, and its problem type."""
    names: dict[Any, str] = model.config.id2label or {}
    return tuple(names[index] for index in sorted(names)), model.config.problem_type


def set_labels(model: PreTrainedModel, labels: Labels) -> None:
    """Makes these the labels of the model: `id2label` and all that transformers derives from it."""
    names, problem_type = labels
    if get_labels(model) == labels:
        return
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {label: index for index, label in enumerate(names)}
    model.config.update({"problem_type": problem_type})
    if hasattr(model, "num_labels"):
        model.num_labels = len(names)  # type: ignore[assignment]


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every LoRA layer by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_heads(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Every adapted head by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters on the model, in the order they came."""
    return list(dict.fromkeys(name for place, _ in adapter_slots(model) for name in place))


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
    wrappers = [head for head in adapter_heads(model).values() if head.active]
    heads = [head.modules_to_save[head.active] for head in wrappers]
    idle = [place[name] for place, active in adapter_slots(model) for name in place if name != active]
    idle += [head.original_module for head in wrappers]
    total = _count(model)
    return ParameterCounts(
        total=total - sum(map(_count, idle)),
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        lora=sum(map(_count, weights)),
        head=sum(map(_count, heads)),
    )


def _count(module: nn.Module) -> int:
    packed = [layer for layer in module.modules() if isinstance(layer, QuantisedLinear)]
    return sum(parameter.numel() for parameter in module.parameters()) + sum(
        layer.in_features * layer.out_features for layer in packed
    )


def adapter_slots(model: nn.Module) -> Iterator[tuple[nn.ModuleDict, str | None]]:
    """Everything that holds adapters by their names, and which of them is active there."""
    for place in [*lora_layers(model).values(), *biased_modules(model).values()]:
        yield place.adapters, place.active
    for head in adapter_heads(model).values():
        yield head.modules_to_save, head.active


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
    idle = {
        value
        for place, active in adapter_slots(model)
        for key in place
        if key != active
        for value in place[key].parameters()
    } | {value for head in adapter_heads(model).values() for value in head.original_module.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter in chosen or (bias == "all" and "bias" in name and parameter not in idle)
    }
