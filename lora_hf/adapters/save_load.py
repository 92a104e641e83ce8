"""One adapter between a model and its folder: saved in PEFT's format, loaded strictly against the model's own skeleton.

A tensor that is missing, extra or of another shape, another base, other labels: each is an error, and nothing of the
model has been touched by then.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.format import WEIGHTS_FILE, AdapterFile, AdapterMetadata, read_adapter, write_adapter
from lora_hf.adapters.peft_config import (
    SavedLayer,
    factor_names,
    from_peft,
    peft_config,
    read_layers,
    shapes,
    start_of,
    to_peft,
)
from lora_hf.adapters.resolve import SavedModel, fetch_adapter
from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import AdapterState, Labels
from lora_hf.lora.fingerprint import check_base, fingerprint
from lora_hf.lora.inject import (
    adapter_heads,
    adapter_names,
    adapter_state,
    add_weights,
    check_new_name,
    eject,
    get_labels,
    inject_head,
    lora_layers,
    merge,
    set_adapter,
)
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.slices import diagonal_blocks
from lora_hf.lora.target_modules import adaptable_modules, head_paths
from lora_hf.lora.variants.biases import (
    add_biases,
    check_no_standalone_biases,
    load_standalone_biases,
    standalone_biases,
    unadapted_biases,
)
from lora_hf.lora.variants.dora import DoraWeights
from lora_hf.lora.variants.embedding import is_base
from lora_hf.lora.variants.table import Variant, initialise
from lora_hf.models.load import dequantise, load_base, load_tokenizer, quantise

PREFIX = "base_model.model."  # what PEFT puts before every path


def save_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default", task: str | None = None) -> Path:
    """Writes adapter `name`, with its head, to `folder`.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    heads = {
        path: head.modules_to_save[name] for path, head in adapter_heads(model).items() if name in head.modules_to_save
    }
    if not layers and not heads:
        raise AdapterError(f"no adapter {name!r} on this model; it has: {', '.join(adapter_names(model)) or 'none'}")
    tensors, places = {}, []
    for path, layer in layers.items():
        weights = layer.adapters[name]
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in to_peft(layer, name).items()}
        rank = tensors[f"{PREFIX}{path}.{factor_names(layer)[0]}"].shape[0]
        times = rank // weights.r
        alpha = weights.lora_alpha * (math.sqrt(times) if weights.use_rslora else times)
        places.append(SavedLayer(path, weights.slices, rank, alpha, times))
    alone = standalone_biases(model, name, PREFIX)
    tensors |= alone
    for path, head in heads.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in head.state_dict().items()}
    classifies = bool(head_paths(model))
    config = model.config
    switch = adapter_state(model)
    labels, problem_type = (
        get_labels(model) if name == switch.active_adapter else switch.labels.get(name, get_labels(model))
    )
    about = AdapterMetadata(
        base=model.name_or_path or "",
        revision=getattr(config, "_commit_hash", None),
        task=task,
        problem_type=problem_type if classifies else None,
        labels=labels if classifies else (),
        num_labels=len(labels) if classifies else None,
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
    write_adapter(Path(folder), peft_config(model, places, list(heads), about) | variant, tensors, about)
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
    file = read_adapter(fetch_adapter(folder, revision))
    heads = _heads(model, file, own_head)
    places = _check(model, file, heads, own_head)
    alone = _free_biases(model, file, places)
    start, doubled = start_of(file)
    config = file.config
    biased = config.get("bias", "none") != "none"
    variant = Variant(bool(config.get("use_rslora")), bool(config.get("use_dora")), start, biased)
    dropout = config.get("lora_dropout", 0.0)
    for place in places:
        alpha = place.lora_alpha / (math.sqrt(place.times) if variant.use_rslora else place.times)
        rank = place.r // place.times
        weights = add_weights(model, place.path, name, place.slices, rank, alpha, dropout, variant)
        layer: Any = model.get_submodule(place.path)
        if start and not doubled:
            initialise(weights, layer, start)
        from_peft(layer, name, file.tensors, f"{PREFIX}{place.path}")
    switch = adapter_state(model)
    add_biases(model, alone, name, switch)
    load_standalone_biases(model, name, file.tensors, PREFIX)
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
    expected: dict[str, tuple[int, ...]] = {}
    said = (start_of(file), bool(file.config.get("use_rslora")))
    for path, layer in layers.items():
        weights = layer.adapters[name]
        expected |= {f"{PREFIX}{path}.{key}": tuple(value.shape) for key, value in to_peft(layer, name).items()}
        wanted = ((weights.start, bool(weights.start)), weights.use_rslora)
        if said != wanted:
            raise AdapterError(
                f"{file.folder} holds another variant of LoRA: expected init_lora_weights={wanted[0][0] or 'default'}, "
                f"use_rslora={wanted[1]}, found {said[0][0] or 'default'}, {said[1]}"
            )
    expected |= {key: tuple(bias.shape) for key, bias in standalone_biases(model, name, PREFIX).items()}
    found = {key: tensor for key, tensor in _without_copies(model, file).items() if not _of_head(model, key)}
    compare(expected, found, f"{file.folder}/{WEIGHTS_FILE}")
    for path, layer in layers.items():
        from_peft(layer, name, file.tensors, f"{PREFIX}{path}")
    load_standalone_biases(model, name, file.tensors, PREFIX)


def _free_biases(model: PreTrainedModel, file: AdapterFile, places: list[SavedLayer]) -> dict[str, nn.Module]:
    paths = [place.path for place in places]
    check_no_standalone_biases(model, paths)
    return unadapted_biases(model, paths, head_paths(model)) if file.config.get("bias") == "all" else {}


def _of_head(model: PreTrainedModel, key: str) -> bool:
    return any(key.startswith(f"{PREFIX}{path}.") for path in head_paths(model)) and ".lora_" not in key


def _without_copies(model: PreTrainedModel, file: AdapterFile) -> dict[str, torch.Tensor]:
    """The file's tensors without PEFT's further copies: of the head's biases (`bias` all), and of base embeddings."""
    parts = ("modules_to_save.", "original_module.") if file.config.get("bias") == "all" else ()
    copies = tuple(f"{PREFIX}{path}.{part}" for path in head_paths(model) for part in parts)
    layers = adaptable_modules(model)
    return {
        key: tensor
        for key, tensor in file.tensors.items()
        if not key.startswith(copies) and not is_base(layers, key.removeprefix(PREFIX), tensor)
    }


def _heads(model: PreTrainedModel, file: AdapterFile, own_head: bool) -> dict[str, nn.Module]:
    """A head for the adapter by its path: a copy of the base's own, with as many labels as the file has."""
    heads = {}
    for path in head_paths(model):
        head = model.get_submodule(path)
        heads[path] = copy.deepcopy(head.original_module if isinstance(head, ModulesToSaveWrapper) else head)
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


def _labels(switch: AdapterState, file: AdapterFile, heads: Mapping[str, nn.Module]) -> Labels:
    """The adapter's labels: what its file says, else the base's, else as transformers names them."""
    about, base = file.about, switch.labels[None]
    if about.num_labels is not None:
        return about.labels, about.problem_type
    count = [len(value) for value in list(heads.values())[-1].state_dict().values()][-1]
    return base if len(base[0]) == count else (tuple(f"LABEL_{index}" for index in range(count)), None)


def _check(
    model: PreTrainedModel, file: AdapterFile, heads: Mapping[str, nn.Module], own_head: bool
) -> list[SavedLayer]:
    """The places that the file adapts, once everything in it is known to fit the model."""
    about = file.about
    if not own_head:
        _check_labels(model, file)
    layers = adaptable_modules(model)
    places = read_layers(layers, file)
    expected: dict[str, tuple[int, ...]] = {}
    biased = file.config.get("bias", "none") != "none"
    for place in places:
        wanted = shapes(layers[place.path], place.r, bool(file.config.get("use_dora")), biased)
        expected |= {f"{PREFIX}{place.path}.{key}": shape for key, shape in wanted.items()}
    for path, module in _free_biases(model, file, places).items():
        expected[f"{PREFIX}{path}.bias"] = tuple(module.bias.shape)  # type: ignore[union-attr]
    for path, head in heads.items():
        expected |= {f"{PREFIX}{path}.{key}": tuple(value.shape) for key, value in head.state_dict().items()}
    compare(expected, _without_copies(model, file), f"{file.folder}/{WEIGHTS_FILE}")
    for place in places:
        b = file.tensors[f"{PREFIX}{place.path}.{factor_names(layers[place.path])[1]}"]
        if sum(int(block.count_nonzero()) for block in diagonal_blocks(b, place.slices)) != int(b.count_nonzero()):
            raise AdapterError(f"{file.folder}: {place.path}.lora_B is not zero outside its slices {place.slices}")
    if about.fingerprint:
        check_base(model, about.fingerprint, str(file.folder))
    return places


def _check_labels(model: PreTrainedModel, file: AdapterFile) -> None:
    about = file.about
    if not head_paths(model) or about.num_labels is None:
        return
    names, _ = adapter_state(model).labels[None]
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
    tensors = _without_copies(model, file)
    for path, head in adapter_heads(model).items():
        start = f"{PREFIX}{path}."
        head.modules_to_save[name].load_state_dict(
            {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        )


def load_saved_model(
    saved: SavedModel, precision: str, adapted: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The adapter on its base, or the whole model, in evaluation mode and on the GPU where there is one; its tokenizer.

    Args:
        precision: of the base, or of the whole model, as in a config; LoRA and head are always fp32. `int8` is for
            inference on the CPU, where the model stays: the adapter merged, the projections multiplied in integers.
        adapted: False leaves the adapter out, for the bare base. A whole model has no base without its training.

    Raises:
        AdapterError: the adapter is damaged or does not fit the base.
        ModelError, HubError: the base cannot be loaded.
    """
    dynamic = precision == "int8"
    config = replace(saved.model, precision="fp32" if dynamic else precision)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(config)
    model = load_base(config, saved.task, saved.seed)
    if adapted and not saved.whole:
        load_adapter(model, saved.folder)
    model.eval()
    if dynamic:
        return quantise(eject(merge(dequantise(model))), "int8", dynamic=True), tokenizer
    if torch.cuda.is_available():
        model.to(torch.device("cuda"))  # type: ignore[call-arg]
    return model, tokenizer
