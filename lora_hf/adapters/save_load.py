"""Saves one adapter of a model in PEFT's format, and loads it back strictly.

Loading compares the file with what the model itself expects before it changes the model. A missing or extra tensor, a
wrong shape, another base or other labels raises AdapterError and leaves the model unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.format import WEIGHTS_FILE, AdapterFile, AdapterMetadata, read_adapter, write_adapter
from lora_hf.adapters.peft_config import (
    PREFIX,
    SavedLayer,
    base_dependent_init,
    expected_shapes,
    factor_keys,
    from_peft,
    modules_in_file,
    peft_config,
    read_layers,
    to_peft,
)
from lora_hf.adapters.resolve import SavedModel, fetch_adapter
from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import AdapterState, Labels
from lora_hf.lora.fingerprint import check_base, fingerprint
from lora_hf.lora.heads import has_labels, head_paths, is_random, modules_to_train, outermost
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
from lora_hf.lora.target_modules import adaptable_modules
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


def save_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default", task: str | None = None) -> Path:
    """Writes adapter `name` with its task head to `folder`, and returns the folder.

    Args:
        task: the name of the task it was trained for. The commands `eval`, `predict` and `generate` need it.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    heads = {
        path: head.modules_to_save[name] for path, head in adapter_heads(model).items() if name in head.modules_to_save
    }
    if not layers and not heads:
        raise AdapterError(f"no adapter {name!r} on this model; it has: {', '.join(adapter_names(model)) or 'none'}")
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in to_peft(layer, name).items()}
    biases = standalone_biases(model, name, PREFIX)
    tensors |= biases
    for path, head in heads.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in head.state_dict().items()}
    all_weights = [layer.adapters[name] for layer in layers.values()]
    saved_layers = [SavedLayer.from_weights(path, layer.adapters[name]) for path, layer in layers.items()]
    labeled = has_labels(model)
    switch = adapter_state(model)
    labels, problem_type = (
        get_labels(model) if name == switch.active_adapter else switch.labels.get(name, get_labels(model))
    )
    metadata = AdapterMetadata(
        base=model.name_or_path or "",
        revision=getattr(model.config, "_commit_hash", None),
        task=task,
        problem_type=problem_type if labeled else None,
        labels=labels if labeled else (),
        num_labels=len(labels) if labeled else None,
        fingerprint=fingerprint(model),
        slices={layer.path: [list(pair) for pair in layer.slices] for layer in saved_layers},
        start=next((weights.start for weights in all_weights), ""),
    )
    lora_biases = any(weights.bias is not None for weights in all_weights)
    variant = {
        "lora_dropout": max((weights.lora_dropout for weights in all_weights), default=0.0),
        "use_rslora": any(weights.use_rslora for weights in all_weights),
        "bias": "all" if biases else "lora_only" if lora_biases else "none",
        "use_dora": any(isinstance(weights, DoraWeights) for weights in all_weights),
    }
    config = peft_config(model, saved_layers, list(heads), metadata) | variant
    write_adapter(Path(folder), config, tensors, metadata)
    return Path(folder)


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    name: str = "default",
    own_head: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Adds the adapter in `folder` to a plain or already adapted model as adapter `name`, and activates it.

    Args:
        folder: an adapter folder, or the hub id of an adapter, `user/name`.
        own_head: accept labels other than the model's, also another number of them. The model has these labels while
            the adapter is active. Adapters of several tasks on one base need this.
        revision: a branch, tag or commit of the hub repository.

    Raises:
        HubError: the hub is out of reach, refuses, or has no such adapter.
        AdapterError: the folder is no readable adapter, or does not fit this model: a missing or extra tensor, a wrong
            shape, another base, other labels. The model is unchanged.
    """
    check_new_name(model, name)
    file = read_adapter(fetch_adapter(folder, revision))
    heads = _new_heads(model, file, own_head)
    saved_layers, biases = _check_fit(model, file, heads, own_head)
    init, holds_init = base_dependent_init(file)
    use_rslora, dropout = bool(file.config.get("use_rslora")), file.config.get("lora_dropout", 0.0)
    variant = Variant(use_rslora, bool(file.config.get("use_dora")), init, _trains_biases(file))
    for saved in saved_layers:
        r, alpha = saved.adapter_rank_and_alpha(use_rslora)
        weights = add_weights(model, saved.path, name, saved.slices, r, alpha, dropout, variant)
        layer: Any = model.get_submodule(saved.path)
        if init and not holds_init:
            initialise(weights, layer, init)
        from_peft(layer, name, file.tensors, f"{PREFIX}{saved.path}")
    switch = adapter_state(model)
    add_biases(model, biases, name, switch)
    load_standalone_biases(model, name, file.tensors, PREFIX)
    if has_labels(model):
        switch.labels[name] = _labels(switch, file, heads)
    inject_head(model, name, heads)
    _load_heads(model, file, name)
    return set_adapter(model, name)


def restore_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default") -> None:
    """Copies the tensors in `folder`, a checkpoint of the same run, into adapter `name` of the model."""
    file = read_adapter(folder)
    copy_lora_weights(model, file, name)
    _load_heads(model, file, name)


def copy_lora_weights(model: PreTrainedModel, file: AdapterFile, name: str = "default") -> None:
    """Copies A and B, without the head, into adapter `name` of the model.

    Raises:
        AdapterError: the file adapts other modules than adapter `name`, with another rank, or is another variant.
    """
    if file.metadata.fingerprint:
        check_base(model, file.metadata.fingerprint, str(file.folder))
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    shapes: dict[str, tuple[int, ...]] = {}
    found_init, found_rslora = base_dependent_init(file), bool(file.config.get("use_rslora"))
    for path, layer in layers.items():
        weights = layer.adapters[name]
        shapes |= {f"{PREFIX}{path}.{key}": tuple(value.shape) for key, value in to_peft(layer, name).items()}
        if (found_init, found_rslora) != ((weights.start, bool(weights.start)), weights.use_rslora):
            raise AdapterError(
                f"{file.folder} holds another variant of LoRA: expected init_lora_weights="
                f"{weights.start or 'default'}, use_rslora={weights.use_rslora}, found {found_init[0] or 'default'}, "
                f"{found_rslora}"
            )
    shapes |= {key: tuple(bias.shape) for key, bias in standalone_biases(model, name, PREFIX).items()}
    found = {key: tensor for key, tensor in _without_copies(model, file).items() if not _in_head(model, key)}
    check_shapes(shapes, found, f"{file.folder}/{WEIGHTS_FILE}")
    for path, layer in layers.items():
        from_peft(layer, name, file.tensors, f"{PREFIX}{path}")
    load_standalone_biases(model, name, file.tensors, PREFIX)


def load_saved_model(
    saved: SavedModel, precision: str, adapted: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an adapter on its base, or a full model, and its tokenizer: in evaluation mode, on the GPU if there is one.

    Args:
        precision: of the base or the full model, as in a config; LoRA and head are always fp32. `int8` is for inference
            on the CPU: it merges the adapter and multiplies the projections in integers.
        adapted: if False, leaves the adapter out. A full model has no such base.

    Raises:
        AdapterError: the adapter is damaged or does not fit the base.
        ModelError, HubError: the base cannot be loaded.
    """
    dynamic = precision == "int8"
    config = replace(saved.model, precision="fp32" if dynamic else precision)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(config)
    model = load_base(config, saved.task, saved.seed)
    if adapted and not saved.is_full_model:
        load_adapter(model, saved.folder)
    model.eval()
    if dynamic:
        return quantise(eject(merge(dequantise(model))), "int8", dynamic=True), tokenizer
    if torch.cuda.is_available():
        model.to(torch.device("cuda"))  # type: ignore[call-arg]
    return model, tokenizer


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises AdapterError that lists the tensors that are missing, extra or of a wrong shape, five of each kind."""
    problems = {
        "missing": [f"{key} {expected[key]}" for key in expected if key not in found],
        "extra": [f"{key} {tuple(found[key].shape)}" for key in found if key not in expected],
        "wrong shape": [
            f"{key}: expected {expected[key]}, found {tuple(found[key].shape)}"
            for key in expected
            if key in found and tuple(found[key].shape) != expected[key]
        ],
    }
    lines = []
    for kind, entries in problems.items():
        lines += [f"{kind}: {entry}" for entry in entries[:5]]
        lines += [f"{kind}: and {len(entries) - 5} more"] if len(entries) > 5 else []
    if lines:
        raise AdapterError("\n  ".join([f"{source} does not fit this model:", *lines]))


def _trains_biases(file: AdapterFile) -> bool:
    return file.config.get("bias", "none") != "none"


def _in_head(model: PreTrainedModel, key: str) -> bool:
    return key.startswith(tuple(f"{PREFIX}{path}." for path in adapter_heads(model)))


def _without_copies(model: PreTrainedModel, file: AdapterFile) -> dict[str, torch.Tensor]:
    """The tensors without PEFT's duplicates: of the head's biases (`bias: all`) and of base embeddings."""
    whole = modules_in_file(model, file)
    parts = ("modules_to_save.", "original_module.") if file.config.get("bias") == "all" else ()
    copies = tuple(f"{PREFIX}{path}.{part}" for path in whole for part in parts)
    owned = tuple(f"{PREFIX}{path}." for path in whole)
    layers = adaptable_modules(model)
    return {
        key: tensor
        for key, tensor in file.tensors.items()
        if not key.startswith(copies)
        and (key.startswith(owned) or not is_base(layers, key.removeprefix(PREFIX), tensor))
    }


def _new_heads(model: PreTrainedModel, file: AdapterFile, own_head: bool) -> dict[str, nn.Module]:
    """Copies of the modules that the file holds whole, by path; with `own_head` the output layer gets its labels.

    A head that the file does not hold is expected as well, unless the base's own comes from its checkpoint.
    """
    paths = modules_in_file(model, file)
    missing = [path for path in modules_to_train(model) if is_random(model, path)]
    heads: dict[str, nn.Module] = {}
    for path in outermost(model, [*paths, *missing]):
        module = model.get_submodule(path)
        heads[path] = copy.deepcopy(module.original_module if isinstance(module, ModulesToSaveWrapper) else module)
    own = [path for path in head_paths(model) if path in heads]
    if own and own_head:
        _resize_output(heads, own[-1], file)
    return heads


def _resize_output(heads: dict[str, nn.Module], path: str, file: AdapterFile) -> None:
    """Gives the last linear layer of a head as many outputs as the file has labels."""
    wrapper = nn.ModuleDict({"head": heads[path]})  # so that a head that is itself the output layer has a parent
    inner = [each for each, module in wrapper.named_modules() if isinstance(module, nn.Linear)][-1]
    old: Any = wrapper.get_submodule(inner)
    weight = file.tensors.get(f"{PREFIX}{path}{inner.removeprefix('head')}.weight")
    if weight is not None and weight.ndim == 2:
        new = nn.Linear(old.in_features, len(weight), old.bias is not None, old.weight.device, old.weight.dtype)
        wrapper.set_submodule(inner, new)
        heads[path] = wrapper["head"]


def _load_heads(model: PreTrainedModel, file: AdapterFile, name: str) -> None:
    tensors = _without_copies(model, file)
    for path, head in adapter_heads(model).items():
        if name not in head.modules_to_save:
            continue
        prefix = f"{PREFIX}{path}."
        head.modules_to_save[name].load_state_dict(
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        )


def _labels(switch: AdapterState, file: AdapterFile, heads: Mapping[str, nn.Module]) -> Labels:
    """The adapter's labels: those in its file, else those of the base, else transformers' default names."""
    metadata, base = file.metadata, switch.labels[None]
    if metadata.num_labels is not None:
        return metadata.labels, metadata.problem_type
    if not heads:
        return base
    count = [len(value) for value in list(heads.values())[-1].state_dict().values()][-1]
    return base if len(base[0]) == count else (tuple(f"LABEL_{index}" for index in range(count)), None)


def _check_fit(
    model: PreTrainedModel, file: AdapterFile, heads: Mapping[str, nn.Module], own_head: bool
) -> tuple[list[SavedLayer], dict[str, nn.Module]]:
    """Checks the file against the model; returns its layers, and the modules of which it trains only the bias."""
    if not own_head:
        _check_labels(model, file)
    owned = tuple(f"{path}." for path in heads)  # PEFT adapts no module that it trains whole
    modules = {path: each for path, each in adaptable_modules(model).items() if not f"{path}.".startswith(owned)}
    layers = read_layers(modules, file)
    paths = [layer.path for layer in layers]
    check_no_standalone_biases(model, paths)
    biases = unadapted_biases(model, paths, heads) if file.config.get("bias") == "all" else {}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        expected = expected_shapes(
            modules[layer.path], layer.r, bool(file.config.get("use_dora")), _trains_biases(file)
        )
        shapes |= {f"{PREFIX}{layer.path}.{key}": shape for key, shape in expected.items()}
    for path, module in biases.items():
        shapes[f"{PREFIX}{path}.bias"] = tuple(module.bias.shape)  # type: ignore[union-attr]
    for path, head in heads.items():
        shapes |= {f"{PREFIX}{path}.{key}": tuple(value.shape) for key, value in head.state_dict().items()}
    check_shapes(shapes, _without_copies(model, file), f"{file.folder}/{WEIGHTS_FILE}")
    for layer in layers:
        b = file.tensors[f"{PREFIX}{layer.path}.{factor_keys(modules[layer.path])[1]}"]
        if sum(int(block.count_nonzero()) for block in diagonal_blocks(b, layer.slices)) != int(b.count_nonzero()):
            raise AdapterError(f"{file.folder}: {layer.path}.lora_B is not zero outside its slices {layer.slices}")
    if file.metadata.fingerprint:
        check_base(model, file.metadata.fingerprint, str(file.folder))
    return layers, biases


def _check_labels(model: PreTrainedModel, file: AdapterFile) -> None:
    metadata = file.metadata
    if not has_labels(model) or metadata.num_labels is None:
        return
    names, _ = adapter_state(model).labels[None]
    if metadata.num_labels != len(names):
        raise AdapterError(
            f"{file.folder} was trained for num_labels={metadata.num_labels} ({', '.join(metadata.labels)}); this "
            f"model has num_labels={len(names)}. Load the base with num_labels={metadata.num_labels}, or the adapter "
            "with own_head=True"
        )
    if _are_named(names) and _are_named(metadata.labels) and names != metadata.labels:
        raise AdapterError(
            f"{file.folder} was trained for the labels {', '.join(metadata.labels)}; this model has {', '.join(names)}"
        )


def _are_named(labels: tuple[str, ...]) -> bool:
    """Whether the labels have names of their own, not transformers' default LABEL_0, LABEL_1, ..."""
    return any(label != f"LABEL_{index}" for index, label in enumerate(labels))
