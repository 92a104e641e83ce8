"""Which modules of a model a config adapts: targets, layers and the ranks and alphas of patterns.

A target, and a key of a pattern, is a role (`q`), a preset of roles (`attention`), `embeddings`, or a module path in
which `*` stands for one segment and the prefix of the base model may be left out.
"""

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
from lora_hf.lora.architectures import ARCHITECTURES, Architecture, Projection
from lora_hf.lora.layers import AdaptedModule, LoraLinear, linear_shape
from lora_hf.lora.quantization import QuantisedLinear
from lora_hf.lora.variants.embedding import embeddings_path

PROJECTIONS = (nn.Linear, Conv1D, QuantisedLinear)


@dataclass(frozen=True)
class Site:
    """A module to adapt and, in a fused projection, the output columns `(start, stop)` of the role."""

    path: str
    role: str
    layout: Literal["linear", "conv1d", "embedding"]
    slice: tuple[int, int] | None = None


def plan(model: PreTrainedModel, lora: LoraConfig) -> list[Site]:
    """The sites that `lora.targets` and `lora.layers` name in this model, in the order of its modules.

    Raises:
        ModelError: a target is a role, and the model type has no entry in the role table.
        ConfigError: a target that matches nothing, two targets that adapt the same columns, or a layer that the model
            does not have.
    """
    modules, prefix = adaptable_modules(model), base_prefix(model)
    layers = None if lora.layers is None else _layer_numbers(lora.layers, modules)
    sites: dict[Site, None] = {}
    for target in dict.fromkeys(lora.targets):
        projections = _projections_of(model, target)
        matches = [site for role in projections for site in _match(role, projections[role], modules, prefix)]
        if not matches:
            raise ConfigError(_no_match(target, model, modules, prefix))
        chosen = [site for site in matches if layers is None or layer_of(site.path) in layers]
        if not chosen:
            numbers = comma_separated(map(str, lora.layers or ()))
            raise ConfigError(f"lora.layers: target {target!r} has no module in the layers {numbers}")
        sites |= dict.fromkeys(chosen)
    order = {path: index for index, path in enumerate(modules)}
    ordered = sorted(sites, key=lambda site: (order[site.path], site.slice or (0, 0)))
    for before, site in pairwise(ordered):
        if before.path == site.path and (before.slice is None or site.slice is None):
            raise ConfigError(
                f"lora.targets: {before.role} and {site.role} both adapt {site.path}; leave one of them out"
            )
    return ordered


def ranks_and_alphas(
    model: PreTrainedModel, sites: Iterable[Site], lora: LoraConfig
) -> dict[str, tuple[list[tuple[int, int]], int, float]]:
    """The slices, rank and alpha of each site, by path. The first pattern that matches a site decides.

    Raises:
        ConfigError: a pattern that matches no site, a rank above the smaller side of a projection, or different numbers
            for roles of one projection.
    """
    sites, modules, prefix = list(sites), adaptable_modules(model), base_prefix(model)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, name):
            if not any(_matches(key, site, prefix) for site in sites):
                roles = comma_separated(dict.fromkeys(site.role for site in sites))
                raise ConfigError(f"lora.{name}: {key!r} matches no adapted module; lora.targets adapts {roles}")

    def value(patterns: Mapping[str, Any], site: Site, default: Any) -> Any:
        return next((number for key, number in patterns.items() if _matches(key, site, prefix)), default)

    ranks: dict[str, tuple[list[tuple[int, int]], int, float]] = {}
    for site in sites:
        in_features, out_features = linear_shape(modules[site.path])
        start, stop = site.slice or (0, out_features)
        r, alpha = value(lora.rank_pattern, site, lora.r), value(lora.alpha_pattern, site, lora.lora_alpha)
        highest = min(in_features, stop - start)
        if r > highest:
            raise ConfigError(
                f"lora.r: {site.path} maps {in_features} to {stop - start}; expected a rank of at most {highest}, "
                f"found {r}"
            )
        slices, common_r, common_alpha = ranks.setdefault(site.path, ([], r, alpha))
        if (r, alpha) != (common_r, common_alpha):
            raise ConfigError(
                f"lora.rank_pattern, lora.alpha_pattern: {site.path} is one projection for several roles, which share "
                f"r and lora_alpha; found {common_r}, {common_alpha:g} and, for {site.role}, {r}, {alpha:g}"
            )
        slices.append((start, stop))
    return ranks


def head_paths(model: PreTrainedModel) -> list[str]:
    """The top-level modules of the model's classification head; none if it has no such head."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    return [path for path in architecture.head if hasattr(model, path)] if architecture else []


def base_prefix(model: PreTrainedModel) -> str:
    """`"roberta."` for a model with a head, empty for the base model itself."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D, packed or not, as `adaptable_modules`."""
    return {path: module for path, module in adaptable_modules(model).items() if not isinstance(module, nn.Embedding)}


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every plain projection and nn.Embedding by its path; one inside an adapted module by the path of that module."""
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if ".original_module" in path:  # the base's own head, which a ModulesToSaveWrapper replaces
            continue
        plain = module.base_layer if isinstance(module, AdaptedModule) else module
        # Subclasses of nn.Embedding may do more than look up a row.
        is_adaptable = isinstance(plain, PROJECTIONS) or type(plain) is nn.Embedding or isinstance(module, LoraLinear)
        if is_adaptable and path.rpartition(".")[0] not in modules:
            modules[path] = plain
    return modules


def layer_of(path: str) -> int | None:
    """The number of the layer that a module path is in: 3 for `encoder.layer.3.output.dense`."""
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return int(number[1]) if number else None


def in_layers(path: str, layers: list[int] | int | None) -> bool:
    """Whether PEFT's layers_to_transform names the layer of a path: a list, a single number, or nothing for all."""
    if layers is None or layers == []:
        return True
    return layer_of(path) in (layers if isinstance(layers, list) else [layers])


def comma_separated(names: Iterable[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(names) or "none"


def _layer_numbers(layers: Iterable[int], paths: Iterable[str]) -> set[int]:
    """The layers from 0 on that `lora.layers` names, which counts from the end with -1, -2, ..."""
    count = 1 + max((number for path in paths if (number := layer_of(path)) is not None), default=-1)
    beyond = [str(layer) for layer in layers if not -count <= layer < count]
    if beyond:
        raise ConfigError(f"lora.layers: this model has {count} layers, 0 to {count - 1}; found {', '.join(beyond)}")
    return {layer % count for layer in layers}


def _projections_of(model: PreTrainedModel, target: str) -> dict[str, Projection]:
    """The projections that a target names, by role; a path is its own role."""
    if "." in target:
        return {target: Projection(target)}
    if target == "embeddings":
        return {target: Projection(embeddings_path(model))}
    table = _architecture(model).projections
    return {role: table[role] for role in PRESETS.get(target, (target,)) if role in table}


def _architecture(model: PreTrainedModel) -> Architecture:
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"model type {kind!r} has no entry in the role table (lora_hf/lora/architectures.py); it has: "
            f"{comma_separated(ARCHITECTURES)}. Name modules by path instead: "
            "lora.targets='[encoder.layer.*.attention.query]'"
        )
    return ARCHITECTURES[kind]


def _match(role: str, projection: Projection, modules: Mapping[str, nn.Module], prefix: str) -> Iterator[Site]:
    expression = _path_expression(projection.path, prefix)
    index, count = projection.slice
    for path, module in modules.items():
        if expression.fullmatch(path):
            width = linear_shape(module)[1] // count
            columns = None if count == 1 else (index * width, (index + 1) * width)
            is_embedding, is_conv1d = isinstance(module, nn.Embedding), isinstance(module, Conv1D)
            yield Site(path, role, "embedding" if is_embedding else "conv1d" if is_conv1d else "linear", columns)


def _matches(key: str, site: Site, prefix: str) -> bool:
    """Whether a key of a pattern is the site's role, a preset of it, or its path."""
    if "." in key:
        return _path_expression(key, prefix).fullmatch(site.path) is not None
    return site.role in PRESETS.get(key, (key,))


def _path_expression(pattern: str, prefix: str) -> re.Pattern[str]:
    return re.compile(f"(?:{re.escape(prefix)})?" + re.escape(pattern).replace(r"\*", r"[^.]+"))


def _no_match(target: str, model: PreTrainedModel, modules: Mapping[str, nn.Module], prefix: str) -> str:
    kind = model.config.model_type
    if "." not in target:
        roles = comma_separated(_architecture(model).projections)
        return f"lora.targets: {kind} has no role {target!r}; it has: {roles}"
    paths = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", path.removeprefix(prefix)) for path in modules)
    near, known = did_you_mean(target, paths, count=3), comma_separated(paths)
    return (
        f"lora.targets: no nn.Linear, Conv1D or nn.Embedding of this {kind} matches {target!r}{near}; it has: {known}"
    )
