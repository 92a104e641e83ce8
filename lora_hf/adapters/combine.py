"""Several adapters of one model made into one: their weighted sum, exactly or at a smaller rank, TIES, and DARE."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_hf.adapters.format import AdapterMetadata, read_adapter_config
from lora_hf.adapters.peft_config import factor_names, to_peft
from lora_hf.adapters.resolve import SavedModel, config_of, find_saved_model
from lora_hf.adapters.save_load import load_adapter, load_saved_model, save_adapter
from lora_hf.core.atomic_io import atomic_folder
from lora_hf.core.errors import AdapterError, ConfigError, did_you_mean
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.core.records import COMBINE_FILE, CombineRecord
from lora_hf.lora.inject import adapter_heads, adapter_names, add_weights, check_new_name, inject_head, lora_layers
from lora_hf.lora.kernels.combination import Factors, Svd, drop, elect, shorten, sum_of_factors, svd_of_factors, trim
from lora_hf.lora.layers import LoraLinear, LoraWeights
from lora_hf.lora.variants.biases import standalone_biases

Method = Literal["linear", "svd", "ties", "dare"]
METHODS: tuple[Method, ...] = get_args(Method)

# What A and B may miss of `delta_weight`, relative to its norm: float32 loses about 1e-7, a variant that is more than
# B A (such as one with a magnitude) differs in the first digits.
PLAIN = 1e-4

Slices = list[tuple[int, int]]


@dataclass(frozen=True)
class Combination:
    """What `combine_adapters` made: by path the rank, of each slice, and what that rank leaves out of the combination.

    An error is relative, in the Frobenius norm: 0 is exact. `error` is the same over all paths together.
    """

    name: str
    method: Method
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float


@dataclass(frozen=True)
class _Made:
    """A and B of the new adapter for each slice of a projection, and the squared norms left out and of all."""

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
    """Makes adapter `name` of the model's adapters, each with its weight, which may be negative, and activates it.

    With `delta_i` what adapter i adds to a base weight (its scaling included) and `w_i` its weight:

    - `linear`: `sum_i w_i delta_i`, exact for any mix of ranks, scalings, slices and targets; the ranks add up.
    - `svd`: the nearest matrices of `rank` to that sum, slice by slice.
    - `ties`: trim, elect, merge (TIES, arXiv 2306.01708, section 3.2), then as `svd`. Of each adapter the share
      `density` of its entries that is largest by magnitude stays, over all projections together; at each entry the sign
      of the weighted sum wins, and the weighted entries of that sign are averaged. With all weights lambda that is the
      paper's `lambda tau_m`.
    - `dare`: drop and rescale (DARE, arXiv 2311.03099, section 3.1), then as `svd`. An entry of `delta_i` stays with
      probability `density`, divided by it, before the weighted sum; `seed` draws.

    A head has no base that it is added to: the heads are averaged, with the weights over their sum, in every method.

    Args:
        rank: of each slice, for all but `linear`; without it the largest that the adapters have there.
        density: for `ties` and `dare`, above 0 and at most 1.

    Raises:
        AdapterError: no adapter of a name; `name` is taken; `ties` on adapters that do not adapt the same columns;
            `linear` or `svd` on a variant that adds more than `scaling * B A`; trained biases. Nothing is added then.
        ConfigError: an argument that makes no sense, or a rank above the smaller side of a projection.
    """
    _check(model, weights, name, method, rank, density)
    layers = {path: layer for path, layer in lora_layers(model).items() if weights.keys() & set(layer.adapters)}
    for path, layer in layers.items():
        _check_rank(rank, path, layer, _slices(layer, weights))
    if method in ("linear", "svd"):
        made = {path: _sum(path, layer, weights, method, rank) for path, layer in layers.items()}
    elif method == "ties":
        made = _ties(layers, weights, density or 1.0, rank)
    else:
        made = _dare(layers, weights, density or 1.0, rank, torch.Generator().manual_seed(seed))
    for path, new in made.items():
        added = add_weights(model, path, name, new.slices, new.rank, lora_alpha=new.rank)  # the scaling is in B
        added.lora_A.copy_(torch.cat([a for a, _ in new.factors]))
        added.lora_B.copy_(torch.cat([b for _, b in new.factors]))
    for head in adapter_heads(model).values():
        head.add(name, _average(head.modules_to_save, weights))
    inject_head(model, name)
    return Combination(
        name,
        method,
        {path: new.rank for path, new in made.items()},
        {path: _relative([new]) for path, new in made.items()},
        _relative(list(made.values())),
    )


def combine_saved(
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    method: Method = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> CombineRecord:
    """`combine_adapters` on folders, each with its weight: writes the new adapter and the record of it to `output`.

    Base, tokens and decoding are those of the first adapter, and its task is the new one's.

    Raises:
        AdapterError: a folder is no readable adapter; the adapters were trained on different bases or for different
            labels; or as `combine_adapters`.
        ConfigError: as `combine_adapters`; also an output that is in the way (see `folders.check_output`).
        ModelError, HubError: the base cannot be loaded.
    """
    _check_method(len(adapters), method, rank, density)
    saved = [_adapter(folder) for folder, _ in adapters]
    _check_together([one.folder for one in saved])
    names = {f"adapter_{index}": weight for index, (_, weight) in enumerate(adapters)}
    first = saved[0]
    with atomic_folder(output, COMBINE_FILE, overwrite) as folder:
        model, _ = load_saved_model(first, "fp32", adapted=False)
        for name, one in zip(names, saved, strict=True):
            load_adapter(model, one.folder, name)
        made = combine_adapters(model, names, "combined", method, rank, density, seed)
        save_adapter(model, folder, "combined", task=first.task.name)
        record = CombineRecord(
            task=first.task.name,
            base=first.model.name,
            adapters=[{"folder": str(place), "weight": weight} for place, weight in adapters],
            method=method,
            density=density,
            seed=seed,
            config=config_of(first),
            ranks=made.ranks,
            errors=made.errors,
            error=made.error,
            versions=versions(),
            git=git_state(),
            machine=machine(),
        )
        record.write(folder / COMBINE_FILE)
    return record


def _sum(path: str, layer: LoraLinear, weights: Mapping[str, float], method: Method, rank: int | None) -> _Made:
    slices = _slices(layer, weights)
    each = [_factors(path, layer, name, weight, slices) for name, weight in _here(layer, weights)]
    sums = [sum_of_factors(of_slice) for of_slice in zip(*each, strict=True)]
    if method == "linear":
        return _Made(slices, sums)
    return _shortened(layer, slices, weights, [svd_of_factors(a, b) for a, b in sums], rank)


def _ties(
    layers: Mapping[str, LoraLinear], weights: Mapping[str, float], density: float, rank: int | None
) -> dict[str, _Made]:
    _check_same_places(layers, weights)
    thresholds = {name: _threshold(layers, name, density) for name in weights}
    made = {}
    for path, layer in layers.items():
        trimmed = [weight * trim(layer.delta_weight(name), thresholds[name]) for name, weight in weights.items()]
        made[path] = _made_of(layer, weights, elect(trimmed), rank)
    return made


def _dare(
    layers: Mapping[str, LoraLinear],
    weights: Mapping[str, float],
    density: float,
    rank: int | None,
    generator: torch.Generator,
) -> dict[str, _Made]:
    made = {}
    for path, layer in layers.items():
        dropped = [
            weight * drop(layer.delta_weight(name), density, generator) for name, weight in _here(layer, weights)
        ]
        made[path] = _made_of(layer, weights, torch.stack(dropped).sum(0), rank)
    return made


def _made_of(layer: LoraLinear, weights: Mapping[str, float], delta: torch.Tensor, rank: int | None) -> _Made:
    slices = _slices(layer, weights)
    svds: list[Svd] = [tuple(torch.linalg.svd(delta[start:stop], full_matrices=False)) for start, stop in slices]
    return _shortened(layer, slices, weights, svds, rank)


def _shortened(
    layer: LoraLinear, slices: Slices, weights: Mapping[str, float], svds: Sequence[Svd], rank: int | None
) -> _Made:
    widest = max(_rank(layer.adapters[name], slices) for name, _ in _here(layer, weights))
    parts = [shorten(svd, min(rank or widest, _highest(layer, slices))) for svd in svds]
    factors = [factors for factors, _, _ in parts]
    return _Made(slices, factors, sum(lost for _, lost, _ in parts), sum(total for _, _, total in parts))


def _here(layer: LoraLinear, weights: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, weight) for name, weight in weights.items() if name in layer.adapters]


def _slices(layer: LoraLinear, weights: Mapping[str, float]) -> Slices:
    """The slices that all of the adapters have here; where they have not the same, the whole output as one."""
    first, *others = (layer.adapters[name].slices for name, _ in _here(layer, weights))
    return first if all(slices == first for slices in others) else [(0, layer.out_features)]


def _rank(weights: LoraWeights, slices: Slices) -> int:
    rank = _width(weights)
    return rank if weights.slices == slices else rank * len(weights.slices)


def _width(weights: LoraWeights) -> int:
    """The rank of each slice as a file holds it."""
    return weights.saved_factors()[1].shape[1]


def _highest(layer: LoraLinear, slices: Slices) -> int:
    return min(layer.in_features, *(stop - start for start, stop in slices))


def _factors(path: str, layer: LoraLinear, name: str, weight: float, slices: Slices) -> list[Factors]:
    """A and `weight * scaling * B` of each slice, or of the whole output where the adapter has other slices."""
    weights: LoraWeights = layer.adapters[name]
    tensors = to_peft(layer, name)
    a, b = (tensors[key] for key in factor_names(layer))
    r = _width(weights)
    delta = layer.delta_weight(name)
    if (weights.scaling * (b @ a) - delta).norm() > PLAIN * delta.norm():
        raise AdapterError(
            f"adapter {name!r} is a variant of LoRA: at {path} it adds more than scaling * B A. Use method dare with "
            "density 1: it sums any deltas and brings the sum to a rank"
        )
    b = weight * weights.scaling * b
    if weights.slices != slices:
        return [(a, b)]
    return [
        (rows, b[start:stop, index * r : (index + 1) * r])
        for index, (rows, (start, stop)) in enumerate(zip(a.split(r), slices, strict=True))
    ]


def _threshold(layers: Mapping[str, LoraLinear], name: str, density: float) -> torch.Tensor:
    """The magnitude that the share `density` of the adapter's entries reaches, of the columns that it adapts."""
    parts = []
    for layer in layers.values():
        delta = layer.delta_weight(name)
        parts += [delta[start:stop].abs().flatten() for start, stop in layer.adapters[name].slices]
    magnitudes = torch.cat(parts)
    kept = max(1, round(density * len(magnitudes)))
    return magnitudes.kthvalue(len(magnitudes) - kept + 1).values


def _average(heads: nn.ModuleDict, weights: Mapping[str, float]) -> nn.Module:
    states = [(heads[name].state_dict(), weight / sum(weights.values())) for name, weight in weights.items()]
    average = copy.deepcopy(heads[next(iter(weights))])
    average.load_state_dict({key: sum(share * state[key] for state, share in states) for key in states[0][0]})
    return average


def _relative(made: Sequence[_Made]) -> float:
    total = sum(new.total for new in made)
    return math.sqrt(sum(new.lost for new in made) / total) if total else 0.0


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
            near = did_you_mean(adapter, known)
            raise AdapterError(f"no adapter {adapter!r} on this model{near}; it has: {', '.join(known) or 'none'}")
        if not math.isfinite(weight):
            raise ConfigError(f"weight of {adapter}: expected a number, found {weight}")
        if any(bias is not None for bias in _biases(model, adapter)):
            raise AdapterError(
                f"adapter {adapter!r} trains biases, which are no delta that could be summed; combine adapters of "
                "lora.bias=none"
            )
    check_new_name(model, name)
    if adapter_heads(model) and abs(sum(weights.values())) < 1e-6:
        raise ConfigError(f"weights: their sum is {sum(weights.values()):g}; heads are averaged over it, choose others")


def _biases(model: PreTrainedModel, name: str) -> list[nn.Parameter | None]:
    beside = [layer.adapters[name].bias for layer in lora_layers(model).values() if name in layer.adapters]
    return [*beside, *standalone_biases(model, name, "").values()]


def _check_method(count: int, method: str, rank: int | None, density: float | None) -> None:
    if not count:
        raise ConfigError("weights: expected an adapter and its weight, found nothing")
    if method not in METHODS:
        near = did_you_mean(method, METHODS)
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, found {method!r}{near}")
    if rank is not None and method == "linear":
        raise ConfigError("rank: method linear keeps every rank to be exact; use svd for a smaller one")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank: expected a whole number >= 1, found {rank}")
    if density is not None and method not in ("ties", "dare"):
        raise ConfigError(f"density: method {method} drops nothing; leave it out")
    if method in ("ties", "dare") and not (density and 0 < density <= 1):
        raise ConfigError(
            f"density: method {method} expects the share to keep, above 0 and at most 1, "
            f"found {'nothing' if density is None else density}"
        )


def _check_rank(rank: int | None, path: str, layer: LoraLinear, slices: Slices) -> None:
    highest = _highest(layer, slices)
    if rank is not None and rank > highest:
        raise ConfigError(f"rank: {path} has {highest} as its smaller side; expected at most that, found {rank}")


def _check_same_places(layers: Mapping[str, LoraLinear], weights: Mapping[str, float]) -> None:
    for path, layer in layers.items():
        slices = {name: layer.adapters[name].slices if name in layer.adapters else [] for name in weights}
        if any(found != next(iter(slices.values())) for found in slices.values()):
            listed = ", ".join(f"{name}: {found or 'none'}" for name, found in slices.items())
            raise AdapterError(
                f"method ties elects among all adapters, and at {path} they adapt different columns ({listed}); "
                "combine adapters of the same targets, or use linear, svd or dare"
            )


def _check_together(folders: Sequence[Path]) -> None:
    """Raises AdapterError, before anything is loaded, for adapters of different bases or with different labels."""
    (first, about), *others = [(folder, read_adapter_config(folder)[1]) for folder in folders]
    for folder, other in others:
        if _other_base(about, other):
            raise AdapterError(
                f"{first} and {folder} were trained on different bases, {about.base} and {other.base}, whose weights "
                "differ; combine adapters of one base"
            )
        if (about.num_labels, about.labels) != (other.num_labels, other.labels):
            raise AdapterError(
                f"{first} and {folder} were trained for different labels: {', '.join(about.labels) or 'none'}, and "
                f"{', '.join(other.labels) or 'none'}; their heads cannot be combined"
            )


def _other_base(one: AdapterMetadata, other: AdapterMetadata) -> bool:
    """Whether the fingerprints say so; of bases held in different precisions only loading can tell."""
    a, b = one.fingerprint, other.fingerprint
    return bool(a and b and a["dtype"] == b["dtype"] and a["sha256"] != b["sha256"])


def _adapter(folder: Path) -> SavedModel:
    saved = find_saved_model(folder)
    if saved.whole:
        raise AdapterError(f"{folder}: a whole model; expected an adapter folder")
    return saved
