"""Combines several adapters of a model into one: as a weighted sum (exact or of lower rank), with TIES or DARE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from lora_hf.adapters.combine_heads import average, check_same_labels, shared_heads
from lora_hf.adapters.fit import check_tokenizer
from lora_hf.adapters.format import AdapterMetadata, read_adapter_config
from lora_hf.adapters.peft_config import factor_keys, to_peft
from lora_hf.adapters.resolve import find_saved_model, run_sections
from lora_hf.adapters.save_load import load_adapter, load_saved_model, save_adapter
from lora_hf.core.atomic_io import atomic_folder
from lora_hf.core.errors import AdapterError, ConfigError, did_you_mean
from lora_hf.core.provenance import provenance
from lora_hf.core.records import COMBINE_FILE, CombineRecord
from lora_hf.lora.inject import adapter_names, add_weights, inject_head, lora_layers, prepare_for_adapter
from lora_hf.lora.kernels.combination import Factors, drop, elect, shorten, sum_of_factors, svd_of_factors, trim
from lora_hf.lora.layers import LoraLinear, LoraWeights
from lora_hf.lora.slices import diagonal_blocks, slice_columns, slice_width
from lora_hf.lora.variants.biases import standalone_biases
from lora_hf.lora.variants.tokens import token_rows
from lora_hf.models.tokenizer_identity import tokenizer_identity

Method = Literal["linear", "svd", "ties", "dare"]
METHODS: tuple[Method, ...] = get_args(Method)

# How far `scaling * B A` may be from `delta_weight`, relative to its norm. float32 loses about 1e-7; a variant that
# adds more than B A, such as DoRA, differs in the first digits.
PLAIN_LORA_RTOL = 1e-4

Slices = list[tuple[int, int]]


@dataclass(frozen=True)
class Combination:
    """The result of `combine_adapters`: the rank of each slice and the truncation error, by module path.

    Errors are relative, in the Frobenius norm; 0 is exact. `error` is the error over all modules.
    """

    name: str
    method: Method
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float


@dataclass(frozen=True)
class _Source:
    """A module with the adapters to combine there, by name with their weights, and the slices of the new adapter."""

    path: str
    layer: LoraLinear
    weights: dict[str, float]
    slices: Slices

    @classmethod
    def of(cls, path: str, layer: LoraLinear, weights: Mapping[str, float]) -> _Source:
        """Keeps the slices if all adapters have the same; else the whole output is one slice."""
        weights = {name: weight for name, weight in weights.items() if name in layer.adapters}
        first, *others = (layer.adapters[name].slices for name in weights)
        same = all(slices == first for slices in others)
        return cls(path, layer, weights, first if same else [(0, layer.out_features)])

    @property
    def max_rank(self) -> int:
        return min(self.layer.in_features, *map(slice_width, self.slices))

    @property
    def default_rank(self) -> int:
        adapters: list[LoraWeights] = [self.layer.adapters[name] for name in self.weights]
        return max(_saved_rank(each) * (1 if each.slices == self.slices else len(each.slices)) for each in adapters)


@dataclass(frozen=True)
class _CombinedLayer:
    """The new A and B of each slice of a module, and the squared norms: what truncation lost, and the total."""

    slices: Slices
    factors: list[Factors]
    lost: float = 0.0
    total: float = 0.0

    @property
    def rank(self) -> int:
        return len(self.factors[0][0])


@torch.no_grad()
def combine_adapters(
    model: PreTrainedModel,
    weights: Mapping[str, float],
    name: str = "combined",
    method: Method = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combination:
    """Adds adapter `name`, a weighted combination of the model's adapters, and activates it. Weights may be negative.

    With `delta_i` the update that adapter i adds to a base weight (with its scaling) and `w_i` its weight:

    - `linear`: `sum_i w_i delta_i`, exact for any mix of ranks, scalings, slices and targets; the ranks add up.
    - `svd`: the best approximation of that sum by matrices of rank `rank`, slice by slice.
    - `ties`: trim, elect, merge (TIES, arXiv 2306.01708, section 3.2), then `svd`. Each adapter keeps the share
      `density` of its entries with the largest magnitude, counted over all modules. Each entry takes the sign of the
      weighted sum, and the weighted entries with that sign are averaged. If all weights are lambda, this is the paper's
      `lambda tau_m`.
    - `dare`: drop and rescale (DARE, arXiv 2311.03099, section 3.1), then `svd`. Before the weighted sum, each entry of
      `delta_i` is kept with probability `density` and divided by it; `seed` seeds the random choices.

    Heads are not updates of a base, so every method averages them, with the weights divided by their sum.

    Args:
        rank: the rank of each slice, for all methods but `linear`; by default the largest rank of the adapters there.
        density: for `ties` and `dare`, above 0 and at most 1.

    Raises:
        AdapterError: an adapter is unknown; `name` is taken; the adapters adapt different columns (`ties`), or add more
            than `scaling * B A` (`linear`, `svd`); they train biases or rows of tokens, have heads of different labels,
            or only some of them train a module fully. The model is unchanged.
        ConfigError: an invalid argument, or a rank above the smaller side of a module.
    """
    _check(model, weights, name, method, rank, density)
    layers = {path: layer for path, layer in lora_layers(model).items() if weights.keys() & set(layer.adapters)}
    sources = [_Source.of(path, layer, weights) for path, layer in layers.items()]
    for source in sources:
        if rank is not None and rank > source.max_rank:
            raise ConfigError(
                f"rank: expected at most {source.max_rank}, the smaller dimension of {source.path}, found {rank}"
            )
    thresholds = {}
    if method == "ties":
        _check_same_columns(sources, weights)
        thresholds = {name: _threshold(sources, name, density or 1.0) for name in weights}
    generator = torch.Generator().manual_seed(seed)
    combined = {
        source.path: _combine(source, method, rank, density or 1.0, thresholds, generator) for source in sources
    }
    for path, new in combined.items():
        added = add_weights(model, path, name, new.slices, new.rank, lora_alpha=new.rank)  # B includes the scaling
        added.lora_A.copy_(torch.cat([a for a, _ in new.factors]))
        added.lora_B.copy_(torch.cat([b for _, b in new.factors]))
    for head in shared_heads(model, weights):
        head.add(name, average(head.modules_to_save, weights))
    inject_head(model, name)
    return Combination(
        name,
        method,
        {path: new.rank for path, new in combined.items()},
        {path: _relative_error([new]) for path, new in combined.items()},
        _relative_error(list(combined.values())),
    )


def combine_saved(
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    method: Method = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    model: str | None = None,
) -> CombineRecord:
    """`combine_adapters` for adapter folders, each with its weight. Writes the new adapter and its record to `output`.

    The new adapter has the base, the tokenizer, the decoding settings and the task of the first one.

    Args:
        model: where the base is now, a folder or a hub id; by default where the adapters say.

    Raises:
        AdapterError: a folder is not a readable adapter; the adapters were trained on different bases or for different
            labels; or as `combine_adapters`.
        ConfigError: as `combine_adapters`; also if `output` exists (see `check_output_folder`).
        ModelError, HubError: the base cannot be loaded.
    """
    _check_method(len(adapters), method, rank, density)
    saved = [find_saved_model(folder, model=model) for folder, _ in adapters]
    for one in saved:
        if one.is_full_model:
            raise AdapterError(f"{one.folder}: a full model; expected an adapter folder")
    _check_compatible([one.folder for one in saved])
    weights = {f"adapter_{index}": weight for index, (_, weight) in enumerate(adapters)}
    first = saved[0]
    with atomic_folder(output, COMBINE_FILE, overwrite) as folder:
        base, tokenizer = load_saved_model(first, "fp32", adapted=False)
        identity = tokenizer_identity(tokenizer)
        for name, one in zip(weights, saved, strict=True):
            load_adapter(base, one.folder, name)
        verified = [check_tokenizer(one.folder, identity) for one in saved]
        combination = combine_adapters(base, weights, "combined", method, rank, density, seed)
        save_adapter(base, folder, "combined", first.task.name, tokenizer if all(verified) else None)
        record = CombineRecord(
            task=first.task.name,
            base=first.model.name,
            adapters=[{"folder": str(source), "weight": weight} for source, weight in adapters],
            method=method,
            density=density,
            seed=seed,
            config=run_sections(first),
            ranks=combination.ranks,
            errors=combination.errors,
            error=combination.error,
            **provenance(),
        )
        record.write(folder / COMBINE_FILE)
    return record


def _combine(
    source: _Source,
    method: Method,
    rank: int | None,
    density: float,
    thresholds: Mapping[str, torch.Tensor],
    generator: torch.Generator,
) -> _CombinedLayer:
    weights, delta_weight = source.weights.items(), source.layer.delta_weight
    if method in ("linear", "svd"):
        adapters = [_factors(source, name, weight) for name, weight in weights]
        sums = [sum_of_factors(slice_factors) for slice_factors in zip(*adapters, strict=True)]
        if method == "linear":
            return _CombinedLayer(source.slices, sums)
        svds = [svd_of_factors(a, b) for a, b in sums]
    else:
        if method == "ties":
            delta = elect([weight * trim(delta_weight(name), thresholds[name]) for name, weight in weights])
        else:
            dropped = [weight * drop(delta_weight(name), density, generator) for name, weight in weights]
            delta = torch.stack(dropped).sum(0)
        parts = [delta[slice_columns(piece)] for piece in source.slices]
        svds = [tuple(torch.linalg.svd(part, full_matrices=False)) for part in parts]
    shortened = [shorten(svd, min(rank or source.default_rank, source.max_rank)) for svd in svds]
    factors, lost, total = zip(*shortened, strict=True)
    return _CombinedLayer(source.slices, list(factors), sum(lost), sum(total))


def _saved_rank(weights: LoraWeights) -> int:
    """The rank of each slice in a file."""
    return weights.saved_factors()[1].shape[1]


def _factors(source: _Source, name: str, weight: float) -> list[Factors]:
    """A and `weight * scaling * B` of each slice, or of the whole output if the adapter has other slices."""
    layer, weights = source.layer, source.layer.adapters[name]
    tensors = to_peft(layer, name)
    a, b = (tensors[key] for key in factor_keys(layer))
    delta = layer.delta_weight(name)
    if (weights.scaling * (b @ a) - delta).norm() > PLAIN_LORA_RTOL * delta.norm():
        raise AdapterError(
            f"adapter {name!r}: its update at {source.path} is not scaling * B A (as with DoRA). Use method dare "
            "with density 1, which sums any updates and truncates the sum to a rank"
        )
    b = weight * weights.scaling * b
    if weights.slices != source.slices:
        return [(a, b)]
    return list(zip(a.split(_saved_rank(weights)), diagonal_blocks(b, source.slices), strict=True))


def _threshold(sources: Sequence[_Source], name: str, density: float) -> torch.Tensor:
    """The magnitude that the largest share `density` of the adapter's entries reaches, within the adapted columns."""
    parts = []
    for source in sources:
        delta = source.layer.delta_weight(name)
        parts += [delta[slice_columns(piece)].abs().flatten() for piece in source.slices]
    magnitudes = torch.cat(parts)
    count = max(1, round(density * len(magnitudes)))
    return magnitudes.kthvalue(len(magnitudes) - count + 1).values


def _relative_error(layers: Sequence[_CombinedLayer]) -> float:
    total = sum(layer.total for layer in layers)
    return math.sqrt(sum(layer.lost for layer in layers) / total) if total else 0.0


def _check(
    model: PreTrainedModel,
    weights: Mapping[str, float],
    name: str,
    method: str,
    rank: int | None,
    density: float | None,
) -> None:
    known = adapter_names(model)
    _check_method(len(weights), method, rank, density)
    for adapter, weight in weights.items():
        if adapter not in known:
            hint = did_you_mean(adapter, known)
            raise AdapterError(f"no adapter {adapter!r} on this model{hint}; it has: {', '.join(known) or 'none'}")
        if not math.isfinite(weight):
            raise ConfigError(f"weight of {adapter}: expected a number, found {weight}")
        layers = [layer.adapters[adapter] for layer in lora_layers(model).values() if adapter in layer.adapters]
        biased = any(each.bias is not None or each.lora_bias is not None for each in layers)
        if biased or standalone_biases(model, adapter, ""):
            raise AdapterError(
                f"adapter {adapter!r} trains biases, which cannot be combined; combine adapters with lora.bias=none "
                "and without PEFT's lora_bias"
            )
        if token_rows(model, adapter):
            raise AdapterError(
                f"adapter {adapter!r} trains rows of the embeddings, which cannot be combined; combine adapters "
                "without PEFT's trainable_token_indices"
            )
    prepare_for_adapter(model, name)
    check_same_labels(model, weights)
    if shared_heads(model, weights) and abs(sum(weights.values())) < 1e-6:
        raise ConfigError(
            f"weights: expected a sum other than 0, because heads are divided by it, found {sum(weights.values()):g}"
        )


def _check_method(count: int, method: str, rank: int | None, density: float | None) -> None:
    if not count:
        raise ConfigError("weights: expected at least one adapter with its weight, found nothing")
    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, found {method!r}{hint}")
    if rank is not None and method == "linear":
        raise ConfigError("rank: method linear is exact and adds the ranks up; use svd for a smaller rank")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank: expected a whole number >= 1, found {rank}")
    if density is not None and method not in ("ties", "dare"):
        raise ConfigError(f"density: method {method} does not use it; leave it out")
    if method in ("ties", "dare") and not (density and 0 < density <= 1):
        found = "nothing" if density is None else density
        raise ConfigError(
            f"density: method {method} expects the share of entries to keep, above 0 and at most 1, found {found}"
        )


def _check_same_columns(sources: Sequence[_Source], weights: Mapping[str, float]) -> None:
    for source in sources:
        adapters = source.layer.adapters
        slices = {name: adapters[name].slices if name in adapters else [] for name in weights}
        if any(each != source.slices for each in slices.values()):
            listed = ", ".join(f"{name}: {each or 'none'}" for name, each in slices.items())
            raise AdapterError(
                f"method ties compares all adapters entry by entry, but at {source.path} they adapt different columns "
                f"({listed}); combine adapters with the same targets, or use linear, svd or dare"
            )


def _check_compatible(folders: Sequence[Path]) -> None:
    """Raises AdapterError for adapters of different bases or labels, before any model is loaded."""
    (first, metadata), *others = [(folder, read_adapter_config(folder)[1]) for folder in folders]
    for folder, other in others:
        if _has_other_base(metadata, other):
            raise AdapterError(
                f"{first} and {folder} were trained on different bases, {metadata.base} and {other.base}, whose "
                "weights differ; combine adapters of one base"
            )
        if (metadata.num_labels, metadata.labels) != (other.num_labels, other.labels):
            raise AdapterError(
                f"{first} and {folder} were trained for different labels: {', '.join(metadata.labels) or 'none'}, and "
                f"{', '.join(other.labels) or 'none'}; their heads cannot be combined"
            )


def _has_other_base(one: AdapterMetadata, other: AdapterMetadata) -> bool:
    """Whether the fingerprints show different bases. For bases of different dtypes, only loading can tell."""
    a, b = one.fingerprint, other.fingerprint
    return bool(a and b and a["dtype"] == b["dtype"] and a["sha256"] != b["sha256"])
