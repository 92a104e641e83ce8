"""Which modules of a model a config adapts, and with which rank and alpha.

A target, and a key of a pattern, is one of

- a role (`q`), or a preset of roles (`attention`, `all`);
- `embeddings`, the token embeddings; `all-linear`, every projection but the output head and what is fully trained;
- a module path in which `*` stands for one segment, and the prefix of the base model may be left out;
- as in PEFT, the end of a path (`q_proj`, `self_attn.q_proj`), or a regular expression of the whole path.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_hf.core.config.schema import PRESETS, ROLES, LoraConfig
from lora_hf.core.errors import ConfigError, did_you_mean
from lora_hf.lora.adapter_dict import modules_of_base
from lora_hf.lora.architectures import ARCHITECTURES, Projection
from lora_hf.lora.heads import base_prefix, embeddings_that_run, input_embeddings, modules_to_train
from lora_hf.lora.layers import AdaptedModule, LoraLinear, linear_shape
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.path_patterns import PathPattern
from lora_hf.lora.quantization import QuantisedLinear
from lora_hf.lora.role_guesses import guess_roles
from lora_hf.lora.slices import Slice, are_disjoint, slice_width
from lora_hf.lora.uncalled_modules import uncalled_modules
from lora_hf.lora.variants.embedding import embeddings_path
from lora_hf.lora.wrappers import unwrap_model

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
_REGEX = re.compile(r"[\\()\[\]|^$+?{}]|[^.]\*|\*[^.]")  # what no path and no pattern with `*` for a segment has
PROJECTIONS = (nn.Linear, Conv1D, QuantisedLinear)


@dataclass(frozen=True)
class Site:
    """A module to adapt and, in a fused projection, the output columns (`lora.slices`) that belong to the role.

    If the target does not name a role, `role` is the target itself.
    """

    path: str
    role: str
    layout: Literal["linear", "conv1d", "embedding"]
    slice: Slice | None = None


def plan(model: PreTrainedModel, lora: LoraConfig) -> list[Site]:
    """The sites that `lora.targets` and `lora.layers` name in this model, in the order of its modules.

    Raises:
        ModelError: the model has random parameters that the adapter could not save.
        ConfigError: a target matches nothing, two targets adapt the same columns, or a layer does not exist.
    """
    model = unwrap_model(model, changes=True)
    modules, prefix = adaptable_modules(model), base_prefix(model)
    whole = tuple(f"{path}." for path in modules_to_train(model, lora.modules_to_save))
    modules = {path: module for path, module in modules.items() if not f"{path}.".startswith(whole)}
    layers = None if lora.layers is None else _layer_numbers(lora.layers, modules)
    running = embeddings_that_run(model)
    sites: dict[Site, None] = {}
    for target in dict.fromkeys(lora.targets):
        found = _sites_of(model, target, modules, prefix)
        if not found:
            raise ConfigError(_no_match(target, model, modules, prefix))
        if running and embeddings_path(model) in {site.path for site in found}:
            raise ConfigError(
                f"lora.targets: {target!r} names {embeddings_path(model)}, which the model never calls, so an adapter "
                f"would have no effect; name {' or '.join(running)}"
            )
        matches = _without_uncalled(model, target, found)
        chosen = [site for site in matches if layers is None or layer_of(site.path) in layers]
        if not chosen:
            numbers = comma_separated(map(str, lora.layers or ()))
            raise ConfigError(f"lora.layers: target {target!r} has no module in the layers {numbers}")
        sites |= dict.fromkeys(chosen)
    order = {path: index for index, path in enumerate(modules)}
    ordered = sorted(sites, key=lambda site: (order[site.path], site.slice or (0, 0)))
    _check_disjoint(ordered, modules)
    _warn_of_refused_roles(model.config.model_type, lora.targets)
    if model.config.model_type not in ARCHITECTURES and any(site.role in ROLES for site in ordered):
        logger.warning("%s", describe_guesses(model.config.model_type, ordered, prefix))
    return ordered


def _without_uncalled(model: PreTrainedModel, target: str, sites: list[Site]) -> list[Site]:
    """The sites whose modules the model calls. Others cause a warning, or an error if the target has no more."""
    uncalled = uncalled_modules(model, [site.path for site in sites])
    if uncalled:
        paths = comma_separated(dict.fromkeys(map(with_stars, uncalled)))
        reason = f"{comma_separated(dict.fromkeys(uncalled.values()))} reads the weight and never calls the module"
        if len(uncalled) == len(sites):
            raise ConfigError(
                f"lora.targets: {target!r} names {paths}, where an adapter would have no effect: {reason}"
            )
        logger.warning("%s: %s are not adapted: %s, so an adapter would have no effect", target, paths, reason)
    return [site for site in sites if site.path not in uncalled]


def _warn_of_refused_roles(kind: str, targets: Iterable[str]) -> None:
    refused = ARCHITECTURES[kind].refused if kind in ARCHITECTURES else {}
    left_out = [role for target in targets for role in PRESETS.get(target, ()) if role in refused]
    if left_out:
        logger.warning("%s: %s are not adapted: %s", kind, ", ".join(left_out), refused[left_out[0]])


def describe_guesses(kind: str, sites: Iterable[Site], prefix: str = "") -> str:
    """Describes the guessed roles, for a user to check before training a model type outside the role table."""
    paths: dict[str, list[str]] = {}
    for site in sites:
        paths.setdefault(with_stars(site.path.removeprefix(prefix)), []).append(site.role)
    width = max(map(len, paths), default=0)
    rows = [f"  {path:<{width}}  {roles[0]} ({len(roles)} modules)" for path, roles in paths.items()]
    return "\n".join([f"model type {kind!r} is not in the role table; its roles are guessed from names:", *rows])


def ranks_and_alphas(
    model: PreTrainedModel, sites: Iterable[Site], lora: LoraConfig
) -> dict[str, tuple[list[Slice], int, float]]:
    """The slices, rank and alpha of each site, by path. The first pattern that matches a site decides.

    Raises:
        ConfigError: a pattern matches no site, a rank exceeds the smaller dimension of a projection, or roles of one
            projection have different ranks or alphas.
    """
    sites, modules, prefix = list(sites), adaptable_modules(model), base_prefix(model)
    expressions = {
        key: _path_expression(key, prefix, f"lora.{name}")
        for name in ("alpha_pattern", "rank_pattern")
        for key in getattr(lora, name)
    }

    def matches(key: str, site: Site) -> bool:
        return _is_named(site, key) or expressions[key].fullmatch(site.path) is not None

    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, name):
            if not any(matches(key, site) for site in sites):
                roles = comma_separated(dict.fromkeys(site.role for site in sites))
                raise ConfigError(f"lora.{name}: {key!r} matches no adapted module; lora.targets adapts {roles}")

    def value(patterns: Mapping[str, Any], site: Site, default: Any) -> Any:
        return next((number for key, number in patterns.items() if matches(key, site)), default)

    ranks: dict[str, tuple[list[Slice], int, float]] = {}
    for site in sites:
        in_features, out_features = linear_shape(modules[site.path])
        piece = site.slice or (0, out_features)
        r, alpha = value(lora.rank_pattern, site, lora.r), value(lora.alpha_pattern, site, lora.lora_alpha)
        width = slice_width(piece)
        highest = min(in_features, width)
        if r > highest:
            raise ConfigError(
                f"lora.r: {site.path} maps {in_features} to {width}; expected a rank of at most {highest}, found {r}"
            )
        slices, common_r, common_alpha = ranks.setdefault(site.path, ([], r, alpha))
        if (r, alpha) != (common_r, common_alpha):
            raise ConfigError(
                f"lora.rank_pattern, lora.alpha_pattern: {site.path} is one projection for several roles, which share "
                f"r and lora_alpha; found {common_r}, {common_alpha:g} and, for {site.role}, {r}, {alpha:g}"
            )
        slices.append(piece)
    return ranks


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D, packed or not, as `adaptable_modules`."""
    return {path: module for path, module in adaptable_modules(model).items() if not isinstance(module, nn.Embedding)}


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every plain projection and nn.Embedding by path. One inside an adapted module has the path of that module."""
    modules: dict[str, nn.Module] = {}
    for path, module in modules_of_base(model):
        if ".original_module" in path:  # nothing within a fully trained module
            continue
        plain = module.base_layer if isinstance(module, AdaptedModule) else module
        plain = plain.original_module if isinstance(plain, ModulesToSaveWrapper) else plain
        # Subclasses of nn.Embedding may do more than look up a row.
        is_adaptable = _is_projection(plain) or type(plain) is nn.Embedding or isinstance(module, LoraLinear)
        if is_adaptable and path.rpartition(".")[0] not in modules:
            modules[path] = plain
    return modules


def _is_projection(module: nn.Module) -> bool:
    """Whether a module is a projection, not another subclass of nn.Linear, such as a router."""
    kind = type(module)
    differs = kind.__module__.startswith("transformers.models.") and kind.forward is not nn.Linear.forward
    return isinstance(module, PROJECTIONS) and (not differs or kind.__name__ == "FalconLinear")


def layer_of(path: str) -> int | None:
    """The number of the layer that a module path is in: 3 for `encoder.layer.3.output.dense`."""
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return int(number[1]) if number else None


def comma_separated(names: Iterable[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(names) or "none"


def _layer_numbers(layers: Iterable[int], paths: Iterable[str]) -> set[int]:
    """The layer numbers in `lora.layers`, with -1, -2, ... resolved from the end."""
    count = 1 + max((number for path in paths if (number := layer_of(path)) is not None), default=-1)
    beyond = [str(layer) for layer in layers if not -count <= layer < count]
    if beyond:
        raise ConfigError(f"lora.layers: this model has {count} layers, 0 to {count - 1}; found {', '.join(beyond)}")
    return {layer % count for layer in layers}


def _sites_of(model: PreTrainedModel, target: str, modules: Mapping[str, nn.Module], prefix: str) -> list[Site]:
    """The sites that one target names; none if it matches nothing."""
    if target == "embeddings":
        return list(_sites(target, Projection(embeddings_path(model)), model, modules, prefix))
    if target == ALL_LINEAR:
        head = model.get_output_embeddings()
        return [
            _site(path, target, module)
            for path, module in modules.items()
            if not isinstance(module, nn.Embedding) and module is not getattr(head, "base_layer", head)
        ]
    if target in ROLES or target in PRESETS:
        return _sites_of_roles(model, target, modules, prefix)
    expression = _path_expression(target, prefix)
    sites = [_site(path, target, module) for path, module in modules.items() if expression.fullmatch(path)]
    return sites or [
        _site(path, target, module) for path, module in modules.items() if path.endswith(f".{target}") or path == target
    ]


def _sites_of_roles(model: PreTrainedModel, target: str, modules: Mapping[str, nn.Module], prefix: str) -> list[Site]:
    kind, roles = model.config.model_type, PRESETS.get(target, (target,))
    if kind in ARCHITECTURES:
        table = ARCHITECTURES[kind].projections
        return [site for role in roles if role in table for site in _sites(role, table[role], model, modules, prefix)]
    layers = {
        path: module
        for path, module in modules.items()
        if layer_of(path) is not None and not isinstance(module, nn.Embedding)
    }
    guesses = guess_roles(layers, getattr(model.config.get_text_config(), "hidden_size", None))
    if target == "all":
        return [_site(path, guesses.get(path, target), module) for path, module in layers.items()]
    return [_site(path, role, modules[path]) for path, role in guesses.items() if role in roles]


def _sites(
    role: str, projection: Projection, model: PreTrainedModel, modules: Mapping[str, nn.Module], prefix: str
) -> Iterator[Site]:
    expressions = [_path_expression(path, prefix) for path in projection.path.split("|")]
    for path, module in modules.items():
        if any(expression.fullmatch(path) for expression in expressions):
            width = linear_shape(module)[1]
            columns = None if projection.columns is None else projection.columns(model.config, width)
            yield _site(path, role, module, columns)


def _site(path: str, role: str, module: nn.Module, columns: Slice | None = None) -> Site:
    is_embedding, is_conv1d = isinstance(module, nn.Embedding), isinstance(module, Conv1D)
    return Site(path, role, "embedding" if is_embedding else "conv1d" if is_conv1d else "linear", columns)


def _check_disjoint(sites: Iterable[Site], modules: Mapping[str, nn.Module]) -> None:
    """Raises ConfigError if two sites of one module share columns."""
    for path, group in groupby(sites, key=lambda site: site.path):
        same, out_features = list(group), linear_shape(modules[path])[1]
        if len(same) > 1 and not are_disjoint([site.slice or (0, out_features) for site in same], out_features):
            names = " and ".join(dict.fromkeys(site.role for site in same))
            raise ConfigError(f"lora.targets: {names} both adapt {path}; leave one of them out")


def _is_named(site: Site, key: str) -> bool:
    """Whether a key of a pattern is the role or target of the site, a preset of it, or the end of its path."""
    return site.role in PRESETS.get(key, (key,)) or f".{site.path}".endswith(f".{key}")


def _path_expression(pattern: str, prefix: str, where: str = "lora.targets") -> re.Pattern[str] | PathPattern:
    """The pattern for module paths: a regular expression, or a path in which `*` stands for one segment.

    Raises:
        ConfigError: the target has characters of a regular expression, but is not a valid one.
    """
    if _REGEX.search(pattern):
        return PathPattern(pattern, where, ConfigError)
    return re.compile(f"(?:{re.escape(prefix)})?" + re.escape(pattern).replace(r"\*", r"[^.]+"))


def with_stars(path: str) -> str:
    """A path with `*` for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _no_match(target: str, model: PreTrainedModel, modules: Mapping[str, nn.Module], prefix: str) -> str:
    kind = model.config.model_type
    if target != "embeddings" and not _sites_of(model, ALL_LINEAR, modules, prefix):
        kinds = {type(module).__name__ for _, module in modules_of_base(model) if not _is_projection(module)}
        others = comma_separated(sorted(each for each in kinds if "linear" in each.lower()))
        return (
            f"lora.targets: LoRA cannot adapt this {kind}: beside its head it has no nn.Linear or Conv1D; its linear "
            f"layers are of the classes: {others}. Choose another base, or train the head alone with train.method=head"
        )
    paths = dict.fromkeys(with_stars(path.removeprefix(prefix)) for path in modules)
    if target in ROLES or target in PRESETS:
        if kind not in ARCHITECTURES:
            endings = dict.fromkeys(
                path.rpartition(".")[2] for path, module in modules.items() if not isinstance(module, nn.Embedding)
            )
            return (
                f"lora.targets: model type {kind!r} is not in the role table, and no module name matches the role "
                f"{target!r}. Set lora.targets to all-linear, or to some of its names: "
                f"{comma_separated(name for name in endings if not name.isdigit())}"
            )
        architecture = ARCHITECTURES[kind]
        refused = [
            architecture.refused[role] for role in PRESETS.get(target, (target,)) if role in architecture.refused
        ]
        reason = f" ({refused[0]})" if refused else ""
        roles = comma_separated(architecture.projections)
        return f"lora.targets: {kind} has no role {target!r}{reason}; it has: {roles}"
    if target == "embeddings":
        found = type(input_embeddings(model)).__name__
        return f"lora.targets: {target}: its embeddings are a {found}; expected a plain nn.Embedding"
    words = [*ROLES, *PRESETS, *paths, *(path.rpartition(".")[2] for path in paths)]
    near = did_you_mean(target, dict.fromkeys(words), count=3)
    return (
        f"lora.targets: no nn.Linear, Conv1D or nn.Embedding of this {kind} matches {target!r}{near}; expected one of "
        f"{comma_separated((*ROLES, *PRESETS, 'embeddings', ALL_LINEAR))}, or the path, the end of a path or a regular "
        f"expression of: {comma_separated(paths)}"
    )
