"""Replaces the projections of a pretrained model with LoRA layers, and restores them.

Every function changes the model in place and returns it, as `nn.Module.to` does. The modules themselves are the only
record of which adapters exist, what is trainable and what is merged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError, did_you_mean
from lora_hf.lora.active_adapter import STATE_ATTRIBUTE, AdapterState, Labels
from lora_hf.lora.adapter_dict import modules_of_base
from lora_hf.lora.heads import has_labels, modules_to_train, new_parameters, task_type, untrained_parameters
from lora_hf.lora.layers import AdaptedModule, Drift, LoraLinear, LoraWeights
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.quantization import QuantisedLinear, check_torchao_gradients, keep_input_gradients
from lora_hf.lora.slices import Slices
from lora_hf.lora.target_modules import Site, comma_separated, plan, ranks_and_alphas
from lora_hf.lora.variants.biases import add_biases, check_no_standalone_biases, unadapted_biases, unwrap_biases
from lora_hf.lora.variants.embedding import check_not_tied, warn_if_tied
from lora_hf.lora.variants.table import PLAIN, Variant, initialise, new_weights
from lora_hf.lora.variants.tokens import token_modules
from lora_hf.lora.wrappers import on_unwrapped_model, unwrap_model

logger = logging.getLogger(__name__)

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: of the running model, trainable, and in the two parts of the active adapter."""

    total: int
    trainable: int
    lora: int
    head: int


def inject(model: PreTrainedModel, lora: LoraConfig, name: str = "default") -> PreTrainedModel:
    """Replaces the planned projections with LoRA layers, copies the task head for the adapter and freezes the rest.

    Modules that the checkpoint did not initialize are copied, trained and saved like the head
    (`heads.modules_to_train`).

    Raises:
        ModelError: as `plan`; or torchao has quantized a weight for inference only.
        ConfigError: as `plan`; or a rank exceeds the smaller dimension of a projection.
        AdapterError: the name is taken or invalid.
    """
    wanted, found = vars(lora)["task_type"], task_type(model)
    if wanted is not None and wanted != found:
        raise ConfigError(
            f"task_type: expected {found or 'none'}, as {type(model).__name__} is the class of the model, found "
            f"{str(wanted).rpartition('.')[2]}; leave it out, or load the model with an auto class for that task"
        )
    return inject_at(model, plan(model, lora), lora, name)


def inject_at(model: PreTrainedModel, sites: list[Site], lora: LoraConfig, name: str = "default") -> PreTrainedModel:
    """`inject` at sites that `plan` has already found with the same `lora`."""
    start = "" if lora.init_lora_weights in ("default", "gaussian") else lora.init_lora_weights
    if (start or lora.use_dora) and any(site.layout == "embedding" for site in sites):
        key = "lora.use_dora" if lora.use_dora else f"lora.init_lora_weights={start}"
        raise ConfigError(f"lora.targets: {key} cannot adapt embeddings; leave out one of the two")
    if start and lora.use_dora:
        raise ConfigError(f"lora.use_dora and lora.init_lora_weights={start} exclude each other; choose one of them")
    ranks = ranks_and_alphas(model, sites, lora)
    prepare_for_adapter(model, name)
    check_no_standalone_biases(model, ranks)
    whole = modules_to_train(model, lora.modules_to_save)
    biases = unadapted_biases(model, ranks, whole) if lora.bias == "all" else {}
    warn_if_tied(model, ranks)
    if untrained := untrained_parameters(model, whole):
        logger.warning(
            "%s: not in the checkpoint, and no module that an adapter can train and save consists of them alone. They "
            "stay frozen at their initial values",
            comma_separated(untrained),
        )
    variant = Variant(lora.use_rslora, lora.use_dora, start, lora.bias != "none")
    for path, (slices, r, alpha) in ranks.items():
        weights = add_weights(model, path, name, slices, r, alpha, lora.lora_dropout, variant)
        initialise(weights, model.get_submodule(path), lora.init_lora_weights)  # type: ignore[arg-type]
    state = adapter_state(model)
    add_biases(model, biases, name, state)
    if state.labels and state.active_adapter is not None:  # whose labels may be its own
        state.labels[name] = state.labels[None]
    return inject_head(model, name, dict.fromkeys(whole))


def inject_head(
    model: PreTrainedModel, name: str = "default", heads: Mapping[str, nn.Module | None] | None = None
) -> PreTrainedModel:
    """Gives adapter `name` its own copy of the task head, activates the adapter and freezes everything else.

    Args:
        heads: the modules that the adapter trains fully, by path; None is a copy of the base's own. By default those of
            `modules_to_train`.
    """
    state = adapter_state(model)
    state.names.setdefault(name)
    heads = dict.fromkeys(modules_to_train(model)) if heads is None else heads
    if heads and new_parameters(model) is None:
        logger.log(
            logging.WARNING if model.name_or_path else logging.INFO,
            "cannot tell which weights of this model are new, because it was copied or built with from_config: %s is "
            "trained as a new head, and the rest is treated as pretrained",
            comma_separated(heads),
        )
    for path, own in heads.items():
        module = model.get_submodule(path)
        if not isinstance(module, ModulesToSaveWrapper):
            _check_unadapted(module, path)
            wrapper = ModulesToSaveWrapper(module, state, within_base=_is_within(model.base_model, module))
            model.set_submodule(path, module := wrapper)
        if name not in module.modules_to_save:
            module.add(name, own)
    if has_labels(model):
        state.labels.setdefault(name, get_labels(model))
    set_adapter(model, name, trainable=True)
    if hasattr(model, "is_quantized"):
        vars(model)["is_quantized"] = False  # Trainer refuses a base that transformers packed and PEFT did not adapt
    return model


def add_weights(
    model: PreTrainedModel,
    path: str,
    name: str,
    slices: Slices,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    variant: Variant = PLAIN,
) -> LoraWeights:
    """Adds new A and B for adapter `name` to one projection, which becomes a LoRA layer if it is not one yet."""
    module, state = model.get_submodule(path), adapter_state(model)
    if isinstance(module, ModulesToSaveWrapper):
        raise AdapterError(f"{path}: another adapter trains this module fully; put the two adapters on separate models")
    if not isinstance(module, LoraLinear):
        model.set_submodule(path, module := LoraLinear(module, state))
    state.names.setdefault(name)
    weights = new_weights(module, slices, r, lora_alpha, lora_dropout, variant)
    module.adapters[name] = weights.train(module.training)
    return weights


@on_unwrapped_model()
def eject(model: PreTrainedModel) -> PreTrainedModel:
    """Restores the plain model, after `merge` the merged one. The base stays frozen; the head is trainable again."""
    return restore_base(model)


def restore_base(model: PreTrainedModel) -> PreTrainedModel:
    """`eject` for a model that may be compiled in parts."""
    layers = lora_layers(model)
    merged = any(layer.merged for layer in layers.values())
    for path, layer in layers.items():
        model.set_submodule(path, layer.running_layer)
    unwrap_biases(model, keep=merged)
    for path, tokens in token_modules(model).items():
        model.set_submodule(path, tokens.base_layer)
    for path, head in adapter_heads(model).items():
        plain = head.modules_to_save[head.active] if merged and head.active else head.original_module
        dtype = next(head.original_module.parameters()).dtype
        model.set_submodule(path, plain.to(dtype).requires_grad_(not head.within_base))
    vars(model).pop("save_pretrained", None)  # of `adapters.pretrained`
    if hasattr(model, "is_quantized"):
        vars(model)["is_quantized"] = True
    if hasattr(model.base_model, STATE_ATTRIBUTE):
        delattr(model.base_model, STATE_ATTRIBUTE)
    return model


@on_unwrapped_model()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Adds the active adapter to the base weights: summed in fp32, rounded once. Merging twice has no effect.

    Other threads may run the model at the same time. They get the same outputs as before the merge, and an AdapterError
    if they run an adapter other than the merged one.

    A quantized base rounds coarsely: a warning reports the error, and `merge_drift` returns it for each module.

    Raises:
        AdapterError: the adapter changes a weight that the input embeddings and the output head share, trains rows of
            the embeddings, or adds a bias where the base has none. Nothing is merged.
    """
    check_mergeable(model)
    for layer in lora_layers(model).values():
        layer.merge()
    drifts = merge_drift(model).values()
    if drifts:
        logger.warning(
            "merged into a quantized base: rounding changed the weights by up to %.2g of their norm and of the "
            "adapter's by up to %.2g; to avoid that, call unmerge(model), dequantise(model) and merge(model)",
            max(drift.of_weight for drift in drifts),
            max(drift.of_delta for drift in drifts),
        )
    return model


def check_mergeable(model: PreTrainedModel) -> None:
    """Raises AdapterError if the active adapter cannot be merged into the base."""
    check_not_tied(model)
    for path, layer in lora_layers(model).items():
        if layer.active and layer.adapters[layer.active].lora_bias is not None and layer.bias is None:
            raise AdapterError(f"{path}: the adapter adds a bias, and the base has none to merge it into")
    if any(module.active for module in token_modules(model).values()):
        raise AdapterError("the adapter has trainable_token_indices, which cannot be merged; use it unmerged")


def merge_drift(model: nn.Module) -> dict[str, Drift]:
    """The rounding errors of a merge into quantized weights, by module path."""
    return {path: layer.drift for path, layer in lora_layers(model).items() if layer.drift}


@on_unwrapped_model()
def unmerge(model: PreTrainedModel) -> PreTrainedModel:
    """Restores the base weights bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    adapter_state(model).merged = False
    return model


@on_unwrapped_model(changes=False)
def set_adapter(model: PreTrainedModel, name: str | None, trainable: bool = False) -> PreTrainedModel:
    """Activates adapter `name`, or the bare base for None, in every context that has not chosen another one.

    With `trainable`, it alone trains from then on. Without, what trains does not change.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    state = adapter_state(model)
    check_adapter_exists(state, name)
    if state.merged:
        unmerge(model)
    if state.labels:
        state.labels[state.active_adapter] = get_labels(model)  # the user may have renamed them
        set_labels(model, state.labels.get(name, state.labels[None]))
    state.active_adapter = name
    if trainable:
        mark_only_lora_as_trainable(model)
        for head in adapter_heads(model).values():
            if name in head.modules_to_save:  # not one that only other adapters train
                head.modules_to_save[name].requires_grad_(True)
    return model


def adapter_state(model: PreTrainedModel) -> AdapterState:
    """The state that all LoRA layers and heads of the model share; created if the model has none."""
    model = unwrap_model(model)
    base = model.base_model
    if not hasattr(base, STATE_ATTRIBUTE):
        state = AdapterState()
        if has_labels(model):
            state.labels[None] = get_labels(model)
        setattr(base, STATE_ATTRIBUTE, state)
    return getattr(base, STATE_ATTRIBUTE)


def check_adapter_exists(state: AdapterState, name: str | None) -> None:
    """Raises AdapterError if the model has no adapter of that name; None is the bare base."""
    if name is not None and name not in state.names:
        known = list(state.names)
        raise AdapterError(
            f"no adapter {name!r} on this model{did_you_mean(name, known)}; it has: {comma_separated(known)}"
        )


def get_labels(model: PreTrainedModel) -> Labels:
    """The names of the model's labels, and its problem type."""
    names: dict[Any, str] = model.config.id2label or {}
    return tuple(names[index] for index in sorted(names)), model.config.problem_type


def set_labels(model: PreTrainedModel, labels: Labels) -> None:
    """Sets the labels of the model: `id2label` and all that transformers derives from it."""
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
    return {path: module for path, module in modules_of_base(model) if isinstance(module, LoraLinear)}


def adapter_heads(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Every adapted head by its path."""
    return {path: module for path, module in modules_of_base(model) if isinstance(module, ModulesToSaveWrapper)}


def adapter_dicts(model: nn.Module) -> Iterator[tuple[nn.ModuleDict, str | None]]:
    """For each adapted module (heads last): its adapters by name, and the name of the active one."""
    modules = [module for _, module in modules_of_base(model)]
    for module in modules:
        if isinstance(module, AdaptedModule):
            yield module.adapters, module.active
    for module in modules:
        if isinstance(module, ModulesToSaveWrapper):
            yield module.modules_to_save, module.active


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters on the model."""
    return list(dict.fromkeys(name for adapters, _ in adapter_dicts(model) for name in adapters))


def prepare_for_adapter(model: nn.Module, name: str) -> None:
    """Prepares the base for `name`. Raises AdapterError for a bad name, ModelError if the base gives no gradients."""
    check_torchao_gradients(model)
    keep_input_gradients(model)
    if name in adapter_names(model):
        raise AdapterError(f"the model already has an adapter named {name!r}; choose another name")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"adapter name {name!r}: expected a word without dots that nn.ModuleDict does not use")


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> nn.Module:
    """Freezes everything, also the head (as loralib does), but the active adapter's A and B and the `bias` biases."""
    model.requires_grad_(False)
    for parameter in _lora_parameters(model, bias):
        parameter.requires_grad_(True)
    return model


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The active adapter's A and B and the biases that `bias` names, by their names in `model.state_dict()`."""
    chosen = _lora_parameters(model, bias)
    names = model.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in names if parameter in chosen}


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts the parameters. Tied modules count once, and trained biases count as LoRA."""
    active = [adapters[name] for adapters, name in adapter_dicts(model) if name]
    heads = [head.modules_to_save[head.active] for head in adapter_heads(model).values() if head.active]
    return ParameterCounts(
        total=_count(model) - sum(map(_count, _idle(model))),
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        lora=sum(map(_count, active)) - sum(map(_count, heads)),
        head=sum(map(_count, heads)),
    )


def _check_unadapted(module: nn.Module, path: str) -> None:
    if any(isinstance(each, AdaptedModule) for each in module.modules()):
        raise AdapterError(
            f"{path}: another adapter has A and B in this module, so no adapter can fully train it; put the two "
            "adapters on separate models"
        )


def _is_within(base: nn.Module, module: nn.Module) -> bool:
    return any(each is module for each in base.modules())


def _count(module: nn.Module) -> int:
    packed = [layer for layer in module.modules() if isinstance(layer, QuantisedLinear)]
    return sum(parameter.numel() for parameter in module.parameters()) + sum(
        layer.in_features * layer.out_features for layer in packed
    )


def _idle(model: nn.Module) -> list[nn.Module]:
    """The adapters and heads that are not running. The base's own head runs if no adapter is active."""
    idle = [adapters[name] for adapters, active in adapter_dicts(model) for name in adapters if name != active]
    return idle + [head.original_module for head in adapter_heads(model).values() if head.active]


def _lora_parameters(model: nn.Module, bias: Bias) -> set[nn.Parameter]:
    if bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"bias: expected one of none, all, lora_only, found {bias!r}")
    active = [each for _, each in modules_of_base(model) if isinstance(each, AdaptedModule) and each.active]
    chosen = {parameter for module in active for parameter in module.adapters[module.active].parameters()}
    if bias == "lora_only":
        chosen |= {layer.bias for layer in active if isinstance(layer, LoraLinear) and layer.bias is not None}
    if bias == "all":
        frozen = [*_idle(model), *(head.original_module for head in adapter_heads(model).values())]
        excluded = {parameter for module in frozen for parameter in module.parameters()}
        names = model.named_parameters(remove_duplicate=False)
        chosen |= {parameter for name, parameter in names if "bias" in name and parameter not in excluded}
    return chosen
