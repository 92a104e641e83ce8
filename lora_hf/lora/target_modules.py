"""Finds what a config's targets name in a model: the projections, their roles and slices, and the task head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_hf.core.config.schema import PRESETS, LoraConfig
from lora_hf.core.errors import ConfigError, ModelError, did_you_mean
from lora_hf.lora.architectures import ARCHITECTURES, Architecture
from lora_hf.lora.layers import LoraLinear, linear_shape
from lora_hf.lora.quantization import QuantisedLinear
from lora_hf.lora.variants.biases import BiasedModule
from lora_hf.lora.variants.embedding import embeddings_path

PROJECTIONS = (nn.Linear, Conv1D, QuantisedLinear)


@dataclass(frozen=True)
class Site:
    """A place to adapt: a module and, in a fused projection, the output columns `(start, stop)` that the role owns."""

    path: str
    role: str
    layout: Literal["linear", "conv1d", "embedding"]
    slice: tuple[int, int] | None = None


def plan(model: PreTrainedModel, lora: LoraConfig) -> list[Site]:
    """The exact sites that `lora.targets` names in this model, in the order of its modules.

    Raises:
        ModelError: a role is asked for and the model type has no entry in the role table.
        ConfigError: a target that matches nothing here, or two targets that adapt the same columns; a layer that the
            model does not have.
    """
    prefix = base_prefix(model)
    layers = adaptable_modules(model)
    chosen = None if lora.layers is None else chosen_layers(lora.layers, layers)
    sites: list[Site] = []
    for target in dict.fromkeys(lora.targets):
        found = [site for pattern in _patterns(model, target) for site in _match(pattern, layers, prefix)]
        if not found:
            raise ConfigError(_no_match(target, model, layers, prefix))
        kept = [site for site in found if chosen is None or layer_of(site.path) in chosen]
        if not kept:
            raise ConfigError(
                f"lora.layers: target {target!r} has no module in the layers {comma_separated(map(str, lora.layers or ()))}"
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


def head_paths(model: PreTrainedModel) -> list[str]:
    """The top-level modules that make the model's classification head; none where it has no such head."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    return [path for path in architecture.head if hasattr(model, path)] if architecture else []


def base_prefix(model: PreTrainedModel) -> str:
    """`"roberta."` in a model with a head, nothing in the base model itself."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D, packed or not, by its path, the ones in a LoRA layer under the path of that layer."""
    return {path: layer for path, layer in adaptable_modules(model).items() if not isinstance(layer, nn.Embedding)}


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every projection and nn.Embedding by its path; one inside a LoRA layer by the path of that layer."""
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if ".original_module" in path:  # what a `ModulesToSaveWrapper` keeps for the bare base is not adapted
            continue
        if isinstance(module, LoraLinear):
            layers[path] = module.base_layer
        elif isinstance(module, BiasedModule):
            layers |= {path: module.base_layer} if isinstance(module.base_layer, PROJECTIONS) else {}
        elif isinstance(module, PROJECTIONS) or type(module) is nn.Embedding:  # some of its children scale
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
            f"model type {kind!r} has no entry in the role table (lora_hf/lora/architectures.py); it has: "
            f"{comma_separated(ARCHITECTURES)}. Name modules by path instead: lora.targets='[encoder.layer.*.attention.query]'"
        )
    return ARCHITECTURES[kind]


def _match(pattern: _Pattern, layers: dict[str, nn.Module], prefix: str) -> Iterator[Site]:
    expression = path_expression(pattern.path, prefix)
    index, count = pattern.slice
    for path, layer in layers.items():
        if expression.fullmatch(path):
            width = linear_shape(layer)[1] // count
            columns = None if count == 1 else (index * width, (index + 1) * width)
            layout = (
                "embedding" if isinstance(layer, nn.Embedding) else "conv1d" if isinstance(layer, Conv1D) else "linear"
            )
            yield Site(path, pattern.role, layout, columns)


def _no_match(target: str, model: PreTrainedModel, layers: dict[str, nn.Module], prefix: str) -> str:
    kind = model.config.model_type
    if "." not in target:
        return (
            f"lora.targets: {kind} has no role {target!r}; it has: {comma_separated(_architecture(model).projections)}"
        )
    templates = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", path.removeprefix(prefix)) for path in layers)
    near = did_you_mean(target, templates, count=3)
    return f"lora.targets: no nn.Linear, Conv1D or nn.Embedding of this {kind} matches {target!r}{near}; it has: " + (
        comma_separated(templates)
    )


def comma_separated(names: object) -> str:
    """Names as a message lists them."""
    return ", ".join(names) or "none"  # type: ignore[arg-type]


def path_expression(pattern: str, prefix: str) -> re.Pattern[str]:
    """Matches whole module paths: `*` stands for one segment, and the `prefix` of the base may be left out."""
    return re.compile(f"(?:{re.escape(prefix)})?" + re.escape(pattern).replace(r"\*", r"[^.]+"))


def ranks_and_alphas(
    sites: Iterable[Any], layers: Mapping[str, nn.Module], lora: LoraConfig, prefix: str
) -> dict[str, tuple[list[tuple[int, int]], int, float]]:
    """For the path of each site its slices, rank and alpha.

    Args:
        sites: with `role`, `path` and `slice`.
        layers: the plain projections by their paths.

    Raises:
        ConfigError: a pattern that fits no site, a rank above the smaller side of a projection, or two numbers for
            roles that are one projection.
    """
    sites = list(sites)
    for key in ("rank_pattern", "alpha_pattern"):
        _check(key, getattr(lora, key), sites, prefix)
    numbers: dict[str, tuple[list[tuple[int, int]], int, float]] = {}
    for site in sites:
        in_features, out_features = linear_shape(layers[site.path])
        start, stop = site.slice or (0, out_features)
        r = _value_at(lora.rank_pattern, site, prefix, lora.r)
        alpha = _value_at(lora.alpha_pattern, site, prefix, lora.lora_alpha)
        if r > min(in_features, stop - start):
            raise ConfigError(
                f"lora.r: {site.path} maps {in_features} to {stop - start}; expected a rank of at most "
                f"{min(in_features, stop - start)}, found {r}"
            )
        slices, common_r, common_alpha = numbers.setdefault(site.path, ([], r, alpha))
        if (r, alpha) != (common_r, common_alpha):
            raise ConfigError(
                f"lora.rank_pattern, lora.alpha_pattern: {site.path} is one projection for several roles, which share "
                f"r and lora_alpha; found {common_r}, {common_alpha:g} and, for {site.role}, {r}, {alpha:g}"
            )
        slices.append((start, stop))
    return numbers


def layer_of(path: str) -> int | None:
    """The number of the layer that a module path lies in: 3 for `encoder.layer.3.output.dense`."""
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return int(number[1]) if number else None


def in_layers(path: str, chosen: list[int] | int | None) -> bool:
    """PEFT's layers_to_transform: a list of layers, a single one, or, where it is empty, all."""
    if chosen is None or chosen == []:
        return True
    return layer_of(path) in (chosen if isinstance(chosen, list) else [chosen])


def chosen_layers(layers: Iterable[int], paths: Iterable[str]) -> set[int]:
    """The numbers meant by `lora.layers`, where -1 is the last layer.

    Args:
        paths: of all modules of the model, which say how many layers it has.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    count = 1 + max((number for path in paths if (number := layer_of(path)) is not None), default=-1)
    beyond = [str(layer) for layer in layers if not -count <= layer < count]
    if beyond:
        raise ConfigError(f"lora.layers: this model has {count} layers, 0 to {count - 1}; found {', '.join(beyond)}")
    return {layer % count for layer in layers}


def _value_at(patterns: Mapping[str, Any], site: Any, prefix: str, common: Any) -> Any:
    """The number of the first pattern that is the place's role, a preset of it, or its path; else the common one."""
    return next((value for key, value in patterns.items() if _fits(key, site, prefix)), common)


def _check(name: str, patterns: Mapping[str, Any], sites: list[Any], prefix: str) -> None:
    for key in patterns:
        if not any(_fits(key, site, prefix) for site in sites):
            roles = ", ".join(dict.fromkeys(site.role for site in sites)) or "nothing"
            raise ConfigError(f"lora.{name}: {key!r} fits no adapted place; lora.targets adapts {roles}")


def _fits(key: str, site: Any, prefix: str) -> bool:
    if "." in key:
        return path_expression(key, prefix).fullmatch(site.path) is not None
    return site.role in PRESETS.get(key, (key,))
