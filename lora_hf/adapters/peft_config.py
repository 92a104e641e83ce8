"""PEFT's config and tensor names, in both directions: which modules an adapter file adapts, with which rank and alpha.

PEFT has no slices of fused projections. In the file, they are one standard LoRA of a larger rank: the A of all slices
are stacked, and B has a block for each slice, with zeros elsewhere.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lora_hf.adapters.format import CONFIG_FILE, AdapterFile, AdapterMetadata
from lora_hf.core.errors import AdapterError
from lora_hf.lora.heads import input_embeddings, new_embeddings, outermost, plain_module, plain_paths, task_type
from lora_hf.lora.layers import LoraLinear, LoraWeights, linear_shape
from lora_hf.lora.path_patterns import MatchBudget, PathPattern
from lora_hf.lora.slices import Slice, are_disjoint, block_diagonal, diagonal_blocks
from lora_hf.lora.variants.dora import DoraWeights

PREFIX = "base_model.model."  # PEFT puts this before every module path
TARGET_FIELDS = ("target_modules", "target_parameters")
# The model types whose former experts PEFT looks for, so that adapters from before transformers 5 load. In types with
# the same experts (DeepSeek-V3, Qwen3-MoE, ...) it takes a `gate_proj` of any other module for theirs, too.
_FORMER_EXPERTS = ("mixtral", "qwen2_moe")


@dataclass(frozen=True)
class SavedLayer:
    """A and B of one module in a file, with the `r` and `lora_alpha` of the file.

    `r` is `rank_multiplier` times the rank of the adapter: once for each slice, and twice that if the file holds the
    initial factors too (see `base_dependent_init`).
    """

    path: str
    slices: list[Slice]
    r: int
    lora_alpha: float
    rank_multiplier: int = 1

    @classmethod
    def from_weights(cls, path: str, weights: LoraWeights) -> SavedLayer:
        r = weights.saved_factors()[0].shape[0]
        multiplier = r // weights.r
        alpha = weights.lora_alpha * _alpha_multiplier(multiplier, weights.use_rslora)
        return cls(path, weights.slices, r, alpha, multiplier)

    def adapter_rank_and_alpha(self, use_rslora: bool) -> tuple[int, float]:
        alpha = self.lora_alpha / _alpha_multiplier(self.rank_multiplier, use_rslora)
        return self.r // self.rank_multiplier, alpha


def _alpha_multiplier(rank_multiplier: int, use_rslora: bool) -> float:
    """The factor for alpha that keeps the scaling (`alpha / r` or `alpha / sqrt(r)`) when the rank is multiplied."""
    return math.sqrt(rank_multiplier) if use_rslora else rank_multiplier


def base_dependent_init(file: AdapterFile) -> tuple[str, bool]:
    """The initialization that depends on the base (`pissa`, `olora` or ``), and whether the file holds its factors.

    PEFT's own files do not: the initial factors are computed from the base and subtracted from it on loading.
    """
    init = str(file.config.get("init_lora_weights", True)).lower()
    saved = file.metadata.start
    return (saved, True) if saved else (init if init in ("pissa", "olora") else "", False)


def peft_config(
    model: PreTrainedModel, layers: list[SavedLayer], modules_to_save: list[str], metadata: AdapterMetadata
) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig. Ranks and alphas other than the most common ones go into the patterns."""
    common = Counter((layer.r, layer.lora_alpha) for layer in layers).most_common(1)
    r, alpha = common[0][0] if common else (1, 1.0)
    others = [layer for layer in layers if (layer.r, layer.lora_alpha) != (r, alpha)]
    names = _names_in_file(model, [layer.path for layer in layers])
    parameters = [name for path, name in names.items() if path != name]
    fields = {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": metadata.base,
        "revision": metadata.revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _path_regex([path for path, name in names.items() if path == name]),
        "modules_to_save": modules_to_save or None,
        "fan_in_fan_out": model.config.model_type == "gpt2",
        "init_lora_weights": True,
        "rank_pattern": {re.escape(names[layer.path]): layer.r for layer in others},
        "alpha_pattern": {re.escape(names[layer.path]): layer.lora_alpha for layer in others},
    }
    if not parameters:  # older versions of PEFT do not have the field
        return fields
    return fields | {"target_modules": fields["target_modules"] or [], "target_parameters": parameters}


def _names_in_file(model: PreTrainedModel, paths: list[str]) -> dict[str, str]:
    """The name of each path in the config: the path or, if PEFT would take it for experts, the name of its weight."""
    taken = _names_of_experts(model.config.model_type)
    return {path: f"{path}.weight" if path.rpartition(".")[2] in taken else path for path in paths}


def _names_of_experts(kind: str) -> set[str]:
    """The last segments of paths that PEFT takes for those of the router and the experts of a model type."""
    own = [each.source_patterns for each in get_checkpoint_conversion_mapping(kind) or ()]
    sources = [
        name
        for family in _FORMER_EXPERTS
        for each in get_checkpoint_conversion_mapping(family) or ()
        if each.source_patterns in own
        for name in each.source_patterns
        if name.endswith(".weight")
    ]
    return {"gate", *(name.split(".")[-2] for name in sources)} if sources else set()


def _path_regex(paths: list[str]) -> str:
    """An anchored expression that matches exactly these paths: `a\\.(?:0|1)\\.b|a\\.(?:0|1)\\.c`."""
    numbers: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        before, *rest = re.split(r"\.(\d+)\.", path, maxsplit=1)
        key = (re.escape(before), *(re.escape(after) for after in rest[1:]))
        numbers.setdefault(key, []).extend(rest[:1])
    return "|".join(rf"\.(?:{'|'.join(layers)})\.".join(key) for key, layers in numbers.items())


def read_layers(modules: Mapping[str, nn.Module], file: AdapterFile) -> list[SavedLayer]:
    """The modules that the file adapts, in the order of `modules`, the adaptable ones of the model by path.

    Raises:
        AdapterError: `target_modules` matches nothing, or a rank or a slice is impossible.
    """
    source = f"{file.folder}/{CONFIG_FILE}"
    init, holds_init = base_dependent_init(file)
    budget = MatchBudget()
    rank_of = _pattern_reader(file, "rank_pattern", "r", budget)
    alpha_of = _pattern_reader(file, "alpha_pattern", "lora_alpha", budget)
    is_parameter = _target_parameters(modules, file)
    layers = []
    for path in _target_paths(modules, file, is_parameter, budget):
        if isinstance(modules[path], nn.Embedding) and (file.config.get("use_dora") or init):
            raise AdapterError(
                f"{source}: {path}: an embedding supports neither use_dora nor init_lora_weights=pissa or olora"
            )
        name = f"{path}.weight" if is_parameter(path) else path
        r, alpha = rank_of(name), alpha_of(name)
        out_features = linear_shape(modules[path])[1]
        slices = [tuple(piece) for piece in file.metadata.slices.get(path, [[0, out_features]])]
        multiplier = len(slices) * (2 if holds_init else 1)
        if r != int(r) or r < 1 or r % multiplier or not are_disjoint(slices, out_features):
            raise AdapterError(
                f"{source}: {path}: expected separate slices of its {out_features} columns and a rank divisible by "
                f"{multiplier}, found the slices {slices} and rank {r}"
            )
        layers.append(SavedLayer(path, slices, int(r), alpha, multiplier))
    return layers


def modules_in_file(model: PreTrainedModel, file: AdapterFile) -> list[str]:
    """The fully trained modules in the file, by path.

    A file of lora_hf names the paths. PEFT compares the ends of paths without a dot before them, so that `classifier`
    is also DistilBERT's `pre_classifier`. It also saves embeddings that were resized, without naming them.
    """
    names, is_own = tuple(file.config.get("modules_to_save") or ()), bool(file.metadata.fingerprint)
    paths = plain_paths(model)
    found = [path for path in paths if path in names or (names and not is_own and path.endswith(names))]
    outer = outermost(model, found)
    inner = [path for path in found if path not in outer and any(True for _ in plain_module(model, path).parameters())]
    if inner and not is_own:
        raise AdapterError(
            f"{file.folder}/{CONFIG_FILE}: modules_to_save {list(names)} names {inner[0]} and a module around it. PEFT "
            "then saves a copy of the inner one that the trained model did not use, so the model cannot be restored; "
            "train it again with only the outer one in modules_to_save"
        )
    unnamed = [path for path in paths if _holds_new_embedding(model, file, path)]
    return outermost(model, [*found, *unnamed])


def _holds_new_embedding(model: PreTrainedModel, file: AdapterFile, path: str) -> bool:
    """Whether the file has embeddings or an output head that its config does not name and that differ from the base."""
    tensor = file.tensors.get(f"{PREFIX}{path}.weight")
    if tensor is None:
        return False
    embeddings = (input_embeddings(model), model.get_output_embeddings())
    if model.get_submodule(path) not in embeddings:
        return False
    weight: Any = plain_module(model, path).weight
    differs = tensor.shape != weight.shape or not torch.equal(tensor.to(weight), weight)
    return differs or path in new_embeddings(model)


def token_rows_in_file(model: PreTrainedModel, file: AdapterFile) -> dict[str, list[int]]:
    """The ids of the tokens whose embeddings the file holds, by the path of the embedding."""
    indices = file.config.get("trainable_token_indices")
    if not indices:
        return {}
    tokens = input_embeddings(model)
    embedding = next((path for path in plain_paths(model) if plain_module(model, path) is tokens), "of tokens")
    named = indices if isinstance(indices, dict) else {embedding: indices}
    found = {}
    for name, ids in named.items():
        path = next((path for path in plain_paths(model) if path == name or path.endswith(f".{name}")), None)
        if path is None or (isinstance(indices, dict) and plain_module(model, path) is not tokens):
            raise AdapterError(
                f"{file.folder}/{CONFIG_FILE}: trainable_token_indices: expected the token embeddings {embedding}, "
                f"found {name!r}. Merge the adapter with PEFT, and load the merged model"
            )
        found[path] = list(ids)
    return found


def _target_parameters(modules: Mapping[str, nn.Module], file: AdapterFile) -> Callable[[str], bool]:
    """Whether PEFT's `target_parameters` names the weight of a module.

    Raises:
        AdapterError: it names anything but weights of linear layers, for example the tensor of all experts.
    """
    names = file.config.get("target_parameters") or []
    weights = [f"{path}.weight" for path, module in modules.items() if isinstance(module, nn.Linear)]
    unknown = [name for name in names if not any(f".{weight}".endswith(f".{name}") for weight in weights)]
    if unknown:
        raise AdapterError(
            f"{file.folder}/{CONFIG_FILE}: target_parameters={unknown[0]!r} not supported: expected weights of linear "
            "layers, and ignoring it would change the outputs. Merge the adapter with the library that wrote it, and "
            "load the merged model"
        )
    endings = tuple(f".{name}" for name in names)
    return lambda path: f".{path}.weight".endswith(endings)


def _target_paths(
    modules: Mapping[str, nn.Module], file: AdapterFile, is_parameter: Callable[[str], bool], budget: MatchBudget
) -> list[str]:
    """The paths that PEFT's fields name, `target_modules` as its `check_target_module_exists` reads it."""
    targets: Any = file.config.get("target_modules")
    source = f"{file.folder}/{CONFIG_FILE}"
    excluded = _selects(file.config.get("exclude_modules") or [], f"{source}: exclude_modules", budget)
    selected = _selects(targets, f"{source}: target_modules", budget)
    in_layers = _layer_filter(file, budget) if isinstance(targets, list) else None
    paths = [
        path
        for path in modules
        if is_parameter(path)
        or (selected(path) and not excluded(path) and (in_layers is None or path in targets or in_layers(path)))
    ]
    if targets and not paths:
        raise AdapterError(f"{source}: target_modules {targets!r} matches no projection of this model")
    return paths


def _selects(names: Any, where: str, budget: MatchBudget) -> Callable[[str], bool]:
    """Whether the whole path matches an expression, or the path is, or ends with, one of a list of names."""
    if isinstance(names, list):
        endings = tuple(f".{name}" for name in names)
        return lambda path: path in names or path.endswith(endings)
    expression = PathPattern(names, where, AdapterError, budget)
    return lambda path: bool(names) and expression.fullmatch(path) is not None


def _layer_filter(file: AdapterFile, budget: MatchBudget) -> Callable[[str], bool] | None:
    """Whether `layers_to_transform` names the layer of a path; None if it is not set."""
    numbers = file.config.get("layers_to_transform")
    if numbers is None or numbers == []:
        return None
    patterns = file.config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    start = r"(?:^|.*?\.)" if file.config.get("layers_pattern") else r".*?\."
    where = f"{file.folder}/{CONFIG_FILE}: layers_pattern"
    expressions = [PathPattern(rf"{start}{pattern}\.(\d+)\.", where, AdapterError, budget) for pattern in patterns]

    def in_layers(path: str) -> bool:
        match = next((match for expression in expressions if (match := expression.match(path))), None)
        return match is not None and int(match[1]) in (numbers if isinstance(numbers, list) else [numbers])

    return in_layers


def _pattern_reader(file: AdapterFile, field: str, default: str, budget: MatchBudget) -> Callable[[str], float]:
    """PEFT's rule: the value of the first pattern that matches the end of the path, else the common value."""
    source = f"{file.folder}/{CONFIG_FILE}"
    patterns = [
        (PathPattern(rf"(.*\.)?({key})$", f"{source}: {field}", AdapterError, budget), value)
        for key, value in (file.config.get(field) or {}).items()
    ]

    def value_of(path: str) -> float:
        value = next((value for pattern, value in patterns if pattern.match(path)), file.config.get(default))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise AdapterError(f"{source}: {default}: expected a number, found {value!r}")
        return value

    return value_of


def factor_keys(layer: nn.Module) -> tuple[str, str]:
    """The names of A and B in a file, relative to the path of the module, adapted or plain."""
    plain = layer.base_layer if isinstance(layer, LoraLinear) else layer
    if isinstance(plain, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def expected_shapes(
    plain: nn.Module, r: int, use_dora: bool = False, bias: bool = False, lora_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a file with rank `r` must hold for a module, by their names relative to it."""
    in_features, out_features = linear_shape(plain)
    a, b = factor_keys(plain)
    shapes: dict[str, tuple[int, ...]] = {a: (r, in_features), b: (out_features, r)}
    if use_dora:
        shapes["lora_magnitude_vector"] = (out_features,)
    if bias and getattr(plain, "bias", None) is not None:
        shapes["base_layer.bias"] = (out_features,)
    if lora_bias:
        shapes["lora_B.bias"] = (out_features,)
    return shapes


def to_peft(layer: LoraLinear, name: str) -> dict[str, torch.Tensor]:
    """The tensors of adapter `name` at one module as a file holds them, by their names relative to the module.

    A `(n * r, in)` and B `(out, n * r)` for n slices, and, where the adapter has them, DoRA's magnitudes and the
    trained bias, `(out,)` each.
    """
    weights = layer.adapters[name]
    a, stacked = weights.saved_factors()
    b = block_diagonal(stacked, weights.slices, layer.out_features)
    tensors = dict(zip(factor_keys(layer), (a, b), strict=True))
    if isinstance(weights, DoraWeights):
        tensors["lora_magnitude_vector"] = weights.magnitudes(layer.original_weight())
    if weights.bias is not None:
        tensors["base_layer.bias"] = weights.bias
    if weights.lora_bias is not None:
        tensors["lora_B.bias"] = weights.lora_bias
    return tensors


@torch.no_grad()
def from_peft(layer: LoraLinear, name: str, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Copies into adapter `name` what `to_peft` returned, from tensors whose names begin with `prefix` and a dot."""
    weights = layer.adapters[name]
    a, b = (tensors[f"{prefix}.{key}"].float() for key in factor_keys(layer))
    stacked = torch.cat(diagonal_blocks(b, weights.slices))
    if stacked.shape == weights.lora_B.shape:
        weights.lora_A.copy_(a)
        weights.lora_B.copy_(stacked)
    else:
        weights.load_factors(a, stacked)
    if isinstance(weights, DoraWeights):
        weights.load_magnitudes(tensors[f"{prefix}.lora_magnitude_vector"].float())
    if weights.bias is not None:
        weights.bias.copy_(tensors[f"{prefix}.base_layer.bias"])
    if weights.lora_bias is not None:
        weights.lora_bias.copy_(tensors[f"{prefix}.lora_B.bias"])
