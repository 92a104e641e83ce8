"""One adapter between a model and its folder: saved in PEFT's format, loaded strictly against the model's own skeleton.

A tensor that is missing, extra or of another shape, another base, other labels: each is an error, and nothing of the
model has been touched by then.
"""

from __future__ import annotations

import math
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
    adaptable,
    adapter_heads,
    adapter_names,
    add_weights,
    check_new_name,
    head_paths,
    inject_head,
    lora_layers,
    set_adapter,
)
from lora_hf.layers import AdapterHead, features
from lora_hf.variants.biases import add_biases, check_no_bias_alone, free_biases, load_lone_biases, lone_biases
from lora_hf.variants.dora import DoraWeights
from lora_hf.variants.embedding import is_base
from lora_hf.variants.patterns import in_layers
from lora_hf.variants.peft_form import blocks, factor_names, from_peft, shapes, to_peft
from lora_hf.variants.table import initialise

PREFIX = "base_model.model."  # what PEFT puts before every path


@dataclass(frozen=True)
class _Place:
    """A and B at one projection as the file holds them: `slices` share the rank `r` of the file evenly.

    `times` is how often the rank of the adapter that is its: once for each slice, and twice where a start is kept.
    """

    path: str
    slices: list[tuple[int, int]]
    r: int
    lora_alpha: float
    times: int = 1


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
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in to_peft(layer, name).items()}
        rank = tensors[f"{PREFIX}{path}.{factor_names(layer)[0]}"].shape[0]
        times = rank // weights.r
        alpha = weights.lora_alpha * (math.sqrt(times) if weights.use_rslora else times)
        places.append(_Place(path, weights.slices, rank, alpha, times))
    alone = lone_biases(model, name, PREFIX)
    tensors |= alone
    for path, head in heads.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in head.state_dict().items()}
    classifies = bool(head_paths(model))
    config = model.config
    about = About(
        base=model.name_or_path or "",
        revision=getattr(config, "_commit_hash", None),
        task=task,
        problem_type=config.problem_type if classifies else None,
        labels=_labels(model) if classifies else (),
        num_labels=config.num_labels if classifies else None,
        fingerprint=fingerprint(model),
        slices={place.path: [list(pair) for pair in place.slices] for place in places},
        start=next((layer.adapters[name].start for layer in layers.values()), ""),
    )
    all_weights = [layer.adapters[name] for layer in layers.values()]
    variant = {
        "lora_dropout": max((weights.lora_dropout for weights in all_weights), default=0.0),
        "use_rslora": any(weights.use_rslora for weights in all_weights),
        "bias": "all" if alone else "lora_only" if any(weights.bias is not None for weights in all_weights) else "none",
        "use_dora": any(isinstance(weights, DoraWeights) for weights in all_weights),
    }
    write_adapter(Path(folder), _peft_config(model, places, list(heads), about) | variant, tensors, about)
    return Path(folder)


def load_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default") -> PreTrainedModel:
    """Puts the adapter in `folder` on a plain or already adapted model, under `name`, and makes it the active one.

    Raises:
        AdapterError: the folder is no readable adapter, or it does not fit this model: a tensor that is missing, extra
            or of another shape, another base, other labels. The model is unchanged then.
    """
    file = read_adapter(folder)
    check_new_name(model, name)
    places = _check(model, file)
    alone = _free_biases(model, file, places)
    start, doubled = _start(file)
    use_rslora, use_dora = bool(file.config.get("use_rslora")), bool(file.config.get("use_dora"))
    for place in places:
        alpha = place.lora_alpha / (math.sqrt(place.times) if use_rslora else place.times)
        weights = add_weights(
            model,
            place.path,
            name,
            place.slices,
            place.r // place.times,
            alpha,
            file.config.get("lora_dropout", 0.0),
            use_rslora,
            use_dora,
            start,
            file.config.get("bias", "none") != "none",
        )
        layer: Any = model.get_submodule(place.path)
        if start and not doubled:
            initialise(weights, layer, start)
        from_peft(layer, name, file.tensors, f"{PREFIX}{place.path}")
    add_biases(model, alone, name)
    load_lone_biases(model, name, file.tensors, PREFIX)
    inject_head(model, name)
    _load_heads(model, file, name)
    _tell_labels(model, file.about)
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
    expected: dict[str, tuple[int, ...]] = {}
    said = (_start(file), bool(file.config.get("use_rslora")))
    for path, layer in layers.items():
        weights = layer.adapters[name]
        expected |= {f"{PREFIX}{path}.{key}": tuple(value.shape) for key, value in to_peft(layer, name).items()}
        wanted = ((weights.start, bool(weights.start)), weights.use_rslora)
        if said != wanted:
            raise AdapterError(
                f"{file.folder} holds another variant of LoRA: expected init_lora_weights={wanted[0][0] or 'default'}, "
                f"use_rslora={wanted[1]}, found {said[0][0] or 'default'}, {said[1]}"
            )
    expected |= {key: tuple(bias.shape) for key, bias in lone_biases(model, name, PREFIX).items()}
    found = {key: tensor for key, tensor in _without_copies(model, file).items() if not _of_head(model, key)}
    _compare(expected, found, file)
    for path, layer in layers.items():
        from_peft(layer, name, file.tensors, f"{PREFIX}{path}")
    load_lone_biases(model, name, file.tensors, PREFIX)


def _free_biases(model: PreTrainedModel, file: AdapterFile, places: list[_Place]) -> dict[str, nn.Module]:
    paths = [place.path for place in places]
    check_no_bias_alone(model, paths)
    return free_biases(model, paths, head_paths(model)) if file.config.get("bias") == "all" else {}


def _of_head(model: PreTrainedModel, key: str) -> bool:
    return any(key.startswith(f"{PREFIX}{path}.") for path in head_paths(model)) and ".lora_" not in key


def _without_copies(model: PreTrainedModel, file: AdapterFile) -> dict[str, torch.Tensor]:
    """The file's tensors without PEFT's further copies: of the head's biases (`bias` all), and of base embeddings."""
    parts = ("modules_to_save.", "original_module.") if file.config.get("bias") == "all" else ()
    copies = tuple(f"{PREFIX}{path}.{part}" for path in head_paths(model) for part in parts)
    layers = adaptable(model)
    return {
        key: tensor
        for key, tensor in file.tensors.items()
        if not key.startswith(copies) and not is_base(layers, key.removeprefix(PREFIX), tensor)
    }


def _start(file: AdapterFile) -> tuple[str, bool]:
    """What A and B of the file started from, and whether the file says it: PEFT's pissa is computed from the base."""
    init = str(file.config.get("init_lora_weights", True)).lower()
    return (file.about.start, True) if file.about.start else (init if init in ("pissa", "olora") else "", False)


def _peft_config(model: PreTrainedModel, places: list[_Place], heads: list[str], about: About) -> dict[str, Any]:
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


def _check(model: PreTrainedModel, file: AdapterFile) -> list[_Place]:
    """The places that the file adapts, once everything in it is known to fit the model."""
    about = file.about
    _check_labels(model, file)
    layers = adaptable(model)
    places = _places(layers, file)
    expected: dict[str, tuple[int, ...]] = {}
    biased = file.config.get("bias", "none") != "none"
    for place in places:
        wanted = shapes(layers[place.path], place.r, bool(file.config.get("use_dora")), biased)
        expected |= {f"{PREFIX}{place.path}.{key}": shape for key, shape in wanted.items()}
    for path, module in _free_biases(model, file, places).items():
        expected[f"{PREFIX}{path}.bias"] = tuple(module.bias.shape)  # type: ignore[union-attr]
    for path in head_paths(model):
        head = model.get_submodule(path)
        plain: nn.Module = head.base_head if isinstance(head, AdapterHead) else head
        expected |= {f"{PREFIX}{path}.{key}": tuple(value.shape) for key, value in plain.state_dict().items()}
    _compare(expected, _without_copies(model, file), file)
    for place in places:
        b = file.tensors[f"{PREFIX}{place.path}.{factor_names(layers[place.path])[1]}"]
        if sum(int(block.count_nonzero()) for block in blocks(b, place.slices)) != int(b.count_nonzero()):
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
        if isinstance(layers[path], nn.Embedding) and (file.config.get("use_dora") or _start(file)[0]):
            raise AdapterError(f"{source}: {path}: an embedding takes neither use_dora nor init_lora_weights=pissa")
        out_features = features(layers[path])[1]
        slices = [(start, stop) for start, stop in file.about.slices.get(path, [[0, out_features]])]
        ordered = [0, *(edge for pair in slices for edge in pair), out_features]
        times = len(slices) * (2 if _start(file)[1] else 1)
        if r != int(r) or r < 1 or r % times or sorted(ordered) != ordered:
            raise AdapterError(
                f"{source}: {path}: rank {r} and slices {slices} of {out_features} columns make no sense"
            )
        places.append(_Place(path, slices, int(r), alpha, times))
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
    about, config = file.about, model.config
    if not head_paths(model) or about.num_labels is None:
        return
    if about.num_labels != config.num_labels:
        raise AdapterError(
            f"{file.folder} was trained for num_labels={about.num_labels} ({', '.join(about.labels)}); this model has "
            f"num_labels={config.num_labels}. Load the base with num_labels={about.num_labels}"
        )
    names = _labels(model)
    if _named(names) and _named(about.labels) and names != tuple(about.labels):
        raise AdapterError(
            f"{file.folder} was trained for the labels {', '.join(about.labels)}; this model has {', '.join(names)}"
        )


def _labels(model: PreTrainedModel) -> tuple[str, ...]:
    names: dict[Any, str] = model.config.id2label or {}
    return tuple(names[index] for index in sorted(names))


def _named(labels: tuple[str, ...]) -> bool:
    """Whether somebody gave the labels names: LABEL_0, LABEL_1, ... is what transformers makes up."""
    return any(label != f"LABEL_{index}" for index, label in enumerate(labels))


def _tell_labels(model: PreTrainedModel, about: About) -> None:
    if head_paths(model) and about.num_labels is not None:
        model.config.id2label = dict(enumerate(about.labels))
        model.config.label2id = {label: index for index, label in enumerate(about.labels)}
        model.config.update({"problem_type": about.problem_type})


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor], file: AdapterFile) -> None:
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
        raise AdapterError("\n  ".join([f"{file.folder}/{WEIGHTS_FILE} does not fit this model:", *lines]))


def _load_heads(model: PreTrainedModel, file: AdapterFile, name: str) -> None:
    tensors = _without_copies(model, file)
    for path, head in adapter_heads(model).items():
        start = f"{PREFIX}{path}."
        head.heads[name].load_state_dict(
            {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        )
