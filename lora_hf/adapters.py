"""One adapter between a model and its folder: saved in PEFT's format, loaded strictly against the model's own skeleton.

A tensor that is missing, extra or of another shape, another base, other labels: each is an error, and nothing of the
model has been touched by then.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_hf.adapter_file import CONFIG_FILE, WEIGHTS_FILE, About, AdapterFile, read_adapter, write_adapter
from lora_hf.errors import AdapterError
from lora_hf.fingerprint import check_base, fingerprint
from lora_hf.injection import (
    adapter_heads,
    adapter_names,
    add_weights,
    check_new_name,
    head_paths,
    inject_head,
    labels_of,
    lora_layers,
    projections,
    set_adapter,
    switch_of,
)
from lora_hf.layers import AdapterHead, LoraWeights, features
from lora_hf.pulling import local_adapter
from lora_hf.switch import Labels, Switch

PREFIX = "base_model.model."  # what PEFT puts before every path


@dataclass(frozen=True)
class _Place:
    """A and B at one projection as the file holds them: `slices` share the rank `r` of the file evenly."""

    path: str
    slices: list[tuple[int, int]]
    r: int
    lora_alpha: float


def save_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default", task: str | None = None) -> Path:
    """Writes adapter `name`, with its head, to `folder`.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    heads = {path: head.heads[name] for path, head in adapter_heads(model).items() if name in head.heads}
    if not layers and not heads:
        raise AdapterError(f"no adapter {name!r} on this model; it has: {', '.join(adapter_names(model)) or 'none'}")
    tensors, places = {}, []
    for path, layer in layers.items():
        weights = layer.adapters[name]
        a, b = to_peft(weights, layer.out_features)
        tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
        count = len(weights.slices)
        places.append(_Place(path, weights.slices, count * weights.r, count * weights.lora_alpha))
    for path, head in heads.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in head.state_dict().items()}
    classifies = bool(head_paths(model))
    config = model.config
    labels, problem_type = switch_of(model).labels.get(name, labels_of(model))
    about = About(
        base=model.name_or_path or "",
        revision=getattr(config, "_commit_hash", None),
        task=task,
        problem_type=problem_type if classifies else None,
        labels=labels if classifies else (),
        num_labels=len(labels) if classifies else None,
        fingerprint=fingerprint(model),
        slices={place.path: [list(pair) for pair in place.slices] for place in places},
    )
    dropout = max((layer.adapters[name].lora_dropout for layer in layers.values()), default=0.0)
    write_adapter(Path(folder), _peft_config(model, places, list(heads), about, dropout), tensors, about)
    return Path(folder)


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    name: str = "default",
    own_head: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Puts the adapter in `folder` on a plain or already adapted model, under `name`, and makes it the active one.

    Args:
        folder: or the hub id of an adapter, `user/name`.
        own_head: take the adapter's labels whatever those of the model are, their number included; while it is active
            they are the model's. Several tasks on one base need it.
        revision: a branch, tag or commit of `user/name`.

    Raises:
        HubError: the hub is out of reach, refuses, or has no such adapter.
        AdapterError: the folder is no readable adapter, or it does not fit this model: a tensor that is missing, extra
            or of another shape, another base, other labels. The model is unchanged then.
    """
    check_new_name(model, name)
    file = read_adapter(local_adapter(folder, revision))
    heads = _heads(model, file, own_head)
    places = _check(model, file, heads, own_head)
    for place in places:
        count = len(place.slices)
        dropout = file.config.get("lora_dropout", 0.0)
        weights = add_weights(
            model, place.path, name, place.slices, place.r // count, place.lora_alpha / count, dropout
        )
        _from_peft(weights, file, place.path)
    switch = switch_of(model)
    if heads:
        switch.labels[name] = _labels(switch, file, heads)
    inject_head(model, name, heads)
    _load_heads(model, file, name)
    return set_adapter(model, name)


def restore_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default") -> None:
    """Copies the tensors in `folder` into adapter `name`, which the model already has (a checkpoint of itself)."""
    file = read_adapter(folder)
    copy_lora_weights(model, file, name)
    _load_heads(model, file, name)


def copy_lora_weights(model: PreTrainedModel, file: AdapterFile, name: str = "default") -> None:
    """Copies A and B, not the head, into adapter `name` of the model.

    Raises:
        AdapterError: the file adapts other places, or with another rank, than adapter `name` does.
    """
    if file.about.fingerprint:
        check_base(model, file.about.fingerprint, str(file.folder))
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    expected = {}
    for path, layer in layers.items():
        rank = len(layer.adapters[name].slices) * layer.adapters[name].r
        expected[f"{PREFIX}{path}.lora_A.weight"] = (rank, layer.in_features)
        expected[f"{PREFIX}{path}.lora_B.weight"] = (layer.out_features, rank)
    found = {key: tensor for key, tensor in file.tensors.items() if ".lora_" in key}
    compare(expected, found, f"{file.folder}/{WEIGHTS_FILE}")
    for path, layer in layers.items():
        _from_peft(layer.adapters[name], file, path)


def to_peft(weights: LoraWeights, out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(n r, in)` and B `(out, n r)` of one standard LoRA that equals the slices: B block-placed, zero elsewhere."""
    r = weights.r
    b = weights.lora_B.new_zeros(out_features, len(weights.slices) * r)
    row = 0
    for index, (start, stop) in enumerate(weights.slices):
        b[start:stop, index * r : (index + 1) * r] = weights.lora_B[row : row + stop - start]
        row += stop - start
    return weights.lora_A, b


def _from_peft(weights: LoraWeights, file: AdapterFile, path: str) -> None:
    a = file.tensors[f"{PREFIX}{path}.lora_A.weight"].float()
    b = file.tensors[f"{PREFIX}{path}.lora_B.weight"].float()
    with torch.no_grad():
        weights.lora_A.copy_(a)
        weights.lora_B.copy_(torch.cat(_blocks(b, weights.slices, weights.r)))


def _blocks(b: torch.Tensor, slices: list[tuple[int, int]], r: int) -> list[torch.Tensor]:
    return [b[start:stop, index * r : (index + 1) * r] for index, (start, stop) in enumerate(slices)]


def _peft_config(
    model: PreTrainedModel, places: list[_Place], heads: list[str], about: About, dropout: float
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
        "lora_dropout": dropout,
        "target_modules": _regex([place.path for place in places]),
        "modules_to_save": heads or None,
        "fan_in_fan_out": model.config.model_type == "gpt2",
        "bias": "none",
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


def _heads(model: PreTrainedModel, file: AdapterFile, own_head: bool) -> dict[str, nn.Module]:
    """A head for the adapter by its path: a copy of the base's own, with as many labels as the file has."""
    heads = {}
    for path in head_paths(model):
        head = model.get_submodule(path)
        heads[path] = copy.deepcopy(head.base_head if isinstance(head, AdapterHead) else head)
    if heads and own_head:
        path, wrapper = list(heads)[-1], nn.Sequential()
        wrapper.head = heads[path]
        inner = [each for each, module in wrapper.named_modules() if isinstance(module, nn.Linear)][-1]
        old: Any = wrapper.get_submodule(inner)
        weight = file.tensors.get(f"{PREFIX}{path}{inner.removeprefix('head')}.weight")
        if weight is not None and weight.ndim == 2:
            new = nn.Linear(old.in_features, len(weight), old.bias is not None, old.weight.device, old.weight.dtype)
            wrapper.set_submodule(inner, new)
            heads[path] = wrapper.head
    return heads


def _labels(switch: Switch, file: AdapterFile, heads: Mapping[str, nn.Module]) -> Labels:
    """The adapter's labels: what its file says, else the base's, else as transformers names them."""
    about, base = file.about, switch.labels[None]
    if about.num_labels is not None:
        return about.labels, about.problem_type
    count = [len(value) for value in list(heads.values())[-1].state_dict().values()][-1]
    return base if len(base[0]) == count else (tuple(f"LABEL_{index}" for index in range(count)), None)


def _check(model: PreTrainedModel, file: AdapterFile, heads: Mapping[str, nn.Module], own_head: bool) -> list[_Place]:
    """The places that the file adapts, once everything in it is known to fit the model."""
    about = file.about
    if not own_head:
        _check_labels(model, file)
    layers = projections(model)
    places = _places(layers, file)
    expected: dict[str, tuple[int, ...]] = {}
    for place in places:
        in_features, out_features = features(layers[place.path])
        expected[f"{PREFIX}{place.path}.lora_A.weight"] = (place.r, in_features)
        expected[f"{PREFIX}{place.path}.lora_B.weight"] = (out_features, place.r)
    for path, head in heads.items():
        expected |= {f"{PREFIX}{path}.{key}": tuple(value.shape) for key, value in head.state_dict().items()}
    compare(expected, file.tensors, f"{file.folder}/{WEIGHTS_FILE}")
    for place in places:
        b = file.tensors[f"{PREFIX}{place.path}.lora_B.weight"]
        blocks = _blocks(b, place.slices, place.r // len(place.slices))
        if sum(int(block.count_nonzero()) for block in blocks) != int(b.count_nonzero()):
            raise AdapterError(f"{file.folder}: {place.path}.lora_B is not zero outside its slices {place.slices}")
    if about.fingerprint:
        check_base(model, about.fingerprint, str(file.folder))
    return places


def _places(layers: Mapping[str, nn.Module], file: AdapterFile) -> list[_Place]:
    targets, source = file.config.get("target_modules"), f"{file.folder}/{CONFIG_FILE}"
    if isinstance(targets, str):
        try:
            expression = re.compile(targets)
        except re.error as error:
            raise AdapterError(f"{source}: target_modules is not a regular expression: {error}") from error
        paths = [path for path in layers if targets and expression.fullmatch(path)]
    elif isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        paths = [path for path in layers if any(path == t or path.endswith(f".{t}") for t in targets)]
    else:
        raise AdapterError(f"{source}: target_modules: expected an expression or a list of names, found {targets!r}")
    if targets and not paths:
        raise AdapterError(f"{source}: target_modules {targets!r} matches no projection of this model")
    places = []
    for path in paths:
        r = _patterned(file, "rank_pattern", path, "r")
        alpha = _patterned(file, "alpha_pattern", path, "lora_alpha")
        out_features = features(layers[path])[1]
        slices = [(start, stop) for start, stop in file.about.slices.get(path, [[0, out_features]])]
        ordered = [0, *(edge for pair in slices for edge in pair), out_features]
        if r != int(r) or r < 1 or r % len(slices) or sorted(ordered) != ordered:
            raise AdapterError(
                f"{source}: {path}: rank {r} and slices {slices} of {out_features} columns make no sense"
            )
        places.append(_Place(path, slices, int(r), alpha))
    return places


def _patterned(file: AdapterFile, pattern: str, path: str, default: str) -> float:
    """PEFT's rule: the first pattern that matches the end of the path, else the common value."""
    value = file.config.get(default)
    for key, special in (file.config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AdapterError(f"{file.folder}/{CONFIG_FILE}: {default}: expected a number, found {value!r}")
    return value


def _check_labels(model: PreTrainedModel, file: AdapterFile) -> None:
    about = file.about
    if not head_paths(model) or about.num_labels is None:
        return
    names, _ = switch_of(model).labels[None]
    if about.num_labels != len(names):
        raise AdapterError(
            f"{file.folder} was trained for num_labels={about.num_labels} ({', '.join(about.labels)}); this model has "
            f"num_labels={len(names)}. Load the base with num_labels={about.num_labels}, or the adapter with "
            "own_head=True"
        )
    if _named(names) and _named(about.labels) and names != tuple(about.labels):
        raise AdapterError(
            f"{file.folder} was trained for the labels {', '.join(about.labels)}; this model has {', '.join(names)}"
        )


def _named(labels: tuple[str, ...]) -> bool:
    """Whether somebody gave the labels names: LABEL_0, LABEL_1, ... is what transformers makes up."""
    return any(label != f"LABEL_{index}" for index, label in enumerate(labels))


def compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises AdapterError with each tensor that is missing, extra or of another shape (the first five of a kind)."""
    kinds = {
        "missing": [f"{key} {expected[key]}" for key in expected if key not in found],
        "extra": [f"{key} {tuple(found[key].shape)}" for key in found if key not in expected],
        "wrong shape": [
            f"{key}: expected {expected[key]}, found {tuple(found[key].shape)}"
            for key in expected
            if key in found and tuple(found[key].shape) != expected[key]
        ],
    }
    lines = []
    for kind, entries in kinds.items():
        lines += [f"{kind}: {entry}" for entry in entries[:5]]
        lines += [f"{kind}: and {len(entries) - 5} more"] if len(entries) > 5 else []
    if lines:
        raise AdapterError("\n  ".join([f"{source} does not fit this model:", *lines]))


def _load_heads(model: PreTrainedModel, file: AdapterFile, name: str) -> None:
    for path, head in adapter_heads(model).items():
        start = f"{PREFIX}{path}."
        head.heads[name].load_state_dict(
            {key.removeprefix(start): value for key, value in file.tensors.items() if key.startswith(start)}
        )
