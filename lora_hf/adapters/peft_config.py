"""The places that an adapter adapts, and the words by which PEFT's adapter_config.json names them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_hf.adapters.format import CONFIG_FILE, AdapterFile, AdapterMetadata
from lora_hf.core.errors import AdapterError
from lora_hf.lora.layers import LoraLinear, linear_shape
from lora_hf.lora.slices import block_diagonal, diagonal_blocks
from lora_hf.lora.target_modules import in_layers
from lora_hf.lora.variants.dora import DoraWeights


@dataclass(frozen=True)
class SavedLayer:
    """A and B at one projection as the file holds them: `slices` share the rank `r` of the file evenly.

    `times` is how often the rank of the adapter that is its: once for each slice, and twice where a start is kept.
    """

    path: str
    slices: list[tuple[int, int]]
    r: int
    lora_alpha: float
    times: int = 1


def start_of(file: AdapterFile) -> tuple[str, bool]:
    """What A and B of the file started from, and whether the file says it: PEFT's pissa is computed from the base."""
    init = str(file.config.get("init_lora_weights", True)).lower()
    return (file.about.start, True) if file.about.start else (init if init in ("pissa", "olora") else "", False)


def peft_config(
    model: PreTrainedModel, places: list[SavedLayer], heads: list[str], about: AdapterMetadata
) -> dict[str, Any]:
    """What PEFT's LoraConfig needs; ranks and alphas that are not the common ones go into its patterns."""
    common = Counter((place.r, place.lora_alpha) for place in places).most_common(1)
    r, alpha = common[0][0] if common else (1, 1.0)
    odd = [place for place in places if (place.r, place.lora_alpha) != (r, alpha)]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": about.base,
        "revision": about.revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _regex([place.path for place in places]),
        "modules_to_save": heads or None,
        "fan_in_fan_out": model.config.model_type == "gpt2",
        "init_lora_weights": True,
        "rank_pattern": {re.escape(place.path): place.r for place in odd},
        "alpha_pattern": {re.escape(place.path): place.lora_alpha for place in odd},
    }


def _regex(paths: list[str]) -> str:
    """One anchored expression that matches exactly these paths: `a\\.(?:0|1)\\.b|a\\.(?:0|1)\\.c`."""
    numbers: dict[str, list[str]] = {}
    for path in paths:
        layer = re.search(r"\.(\d+)\.", path)
        key = (
            re.escape(path)
            if layer is None
            else re.escape(path[: layer.start()]) + "\n" + re.escape(path[layer.end() :])
        )
        numbers.setdefault(key, []).append(layer[1] if layer else "")
    return "|".join(key.replace("\n", rf"\.(?:{'|'.join(layers)})\.") for key, layers in numbers.items())


def read_layers(layers: Mapping[str, nn.Module], file: AdapterFile) -> list[SavedLayer]:
    """The places that the file names, in the order of the model's modules.

    Raises:
        AdapterError: names that match nothing, ranks or slices that make no sense.
    """
    targets, source = file.config.get("target_modules"), f"{file.folder}/{CONFIG_FILE}"
    if isinstance(targets, str):
        try:
            expression = re.compile(targets)
        except re.error as error:
            raise AdapterError(f"{source}: target_modules is not a regular expression: {error}") from error
        paths = [path for path in layers if targets and expression.fullmatch(path)]
    elif isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        chosen = file.config.get("layers_to_transform")
        paths = [
            path
            for path in layers
            if path in targets or (any(path.endswith(f".{t}") for t in targets) and in_layers(path, chosen))
        ]
    else:
        raise AdapterError(f"{source}: target_modules: expected an expression or a list of names, found {targets!r}")
    if targets and not paths:
        raise AdapterError(f"{source}: target_modules {targets!r} matches no projection of this model")
    places = []
    for path in paths:
        r = _patterned(file, "rank_pattern", path, "r")
        alpha = _patterned(file, "alpha_pattern", path, "lora_alpha")
        if isinstance(layers[path], nn.Embedding) and (file.config.get("use_dora") or start_of(file)[0]):
            raise AdapterError(f"{source}: {path}: an embedding takes neither use_dora nor init_lora_weights=pissa")
        out_features = linear_shape(layers[path])[1]
        slices = [(start, stop) for start, stop in file.about.slices.get(path, [[0, out_features]])]
        ordered = [0, *(edge for pair in slices for edge in pair), out_features]
        times = len(slices) * (2 if start_of(file)[1] else 1)
        if r != int(r) or r < 1 or r % times or sorted(ordered) != ordered:
            raise AdapterError(
                f"{source}: {path}: rank {r} and slices {slices} of {out_features} columns make no sense"
            )
        places.append(SavedLayer(path, slices, int(r), alpha, times))
    return places


def _patterned(file: AdapterFile, pattern: str, path: str, default: str) -> float:
    """PEFT's rule: the first pattern that matches the end of the path, else the common value."""
    value = file.config.get(default)
    for key, special in (file.config.get(pattern) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", path)
        except re.error as error:
            source = f"{file.folder}/{CONFIG_FILE}"
            raise AdapterError(f"{source}: {pattern}: {key!r} is not a regular expression: {error}") from error
        if matches:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AdapterError(f"{file.folder}/{CONFIG_FILE}: {default}: expected a number, found {value!r}")
    return value


def to_peft(layer: LoraLinear, name: str) -> dict[str, torch.Tensor]:
    """A `(n r, in)` and B `(out, n r)` of one standard LoRA that equals the slices: B block-placed, zero elsewhere.

    Beside them DoRA's magnitudes and the trained bias, `(out,)` each, where the adapter has them.
    """
    weights = layer.adapters[name]
    a, stacked = weights.saved_factors()
    b = block_diagonal(stacked, weights.slices, layer.out_features)
    tensors = dict(zip(factor_names(layer), (a, b), strict=True))
    if isinstance(weights, DoraWeights):
        tensors["lora_magnitude_vector"] = weights.magnitudes(layer.original_weight())
    if weights.bias is not None:
        tensors["base_layer.bias"] = weights.bias
    return tensors


def shapes(plain: nn.Module, r: int, use_dora: bool, bias: bool) -> dict[str, tuple[int, ...]]:
    """What a file must hold for a projection with rank `r` in the file."""
    in_features, out_features = linear_shape(plain)
    found: dict[str, tuple[int, ...]] = dict(
        zip(factor_names(plain), ((r, in_features), (out_features, r)), strict=True)
    )
    if use_dora:
        found["lora_magnitude_vector"] = (out_features,)
    if bias and getattr(plain, "bias", None) is not None:
        found["base_layer.bias"] = (out_features,)
    return found


def factor_names(layer: nn.Module) -> tuple[str, str]:
    """What a file calls A and B of a projection, wrapped or plain."""
    plain = layer.base_layer if isinstance(layer, LoraLinear) else layer
    if isinstance(plain, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


@torch.no_grad()
def from_peft(layer: LoraLinear, name: str, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Takes what `to_peft` gave, from the tensors of a file in which it lies under `path`."""
    weights = layer.adapters[name]
    a, b = (tensors[f"{path}.{key}"].float() for key in factor_names(layer))
    stacked = torch.cat(diagonal_blocks(b, weights.slices))
    if stacked.shape == weights.lora_B.shape:
        weights.lora_A.copy_(a)
        weights.lora_B.copy_(stacked)
    else:
        weights.load_factors(a, stacked)
    if isinstance(weights, DoraWeights):
        weights.load_magnitudes(tensors[f"{path}.lora_magnitude_vector"].float())
    if weights.bias is not None:
        weights.bias.copy_(tensors[f"{path}.base_layer.bias"])
