"""Checks whether an adapter file fits a model: its tensors, head, labels, base and tokenizer.

The model is not changed. For a file that does not fit, one AdapterError lists everything that is wrong.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_hf.adapters.format import WEIGHTS_FILE, AdapterFile, are_named, read_adapter_config
from lora_hf.adapters.peft_config import (
    PREFIX,
    SavedLayer,
    expected_shapes,
    factor_keys,
    modules_in_file,
    read_layers,
    token_rows_in_file,
)
from lora_hf.core.errors import AdapterError
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.lora.active_adapter import AdapterState, Labels
from lora_hf.lora.fingerprint import check_base
from lora_hf.lora.heads import (
    has_labels,
    head_paths,
    input_embeddings,
    is_random,
    modules_to_train,
    new_embeddings,
    outermost,
    plain_module,
    plain_paths,
)
from lora_hf.lora.inject import adapter_heads, adapter_state
from lora_hf.lora.quantization import unpack_quantized
from lora_hf.lora.slices import diagonal_blocks
from lora_hf.lora.target_modules import adaptable_modules
from lora_hf.lora.variants.biases import check_no_standalone_biases, unadapted_biases
from lora_hf.lora.variants.embedding import is_base
from lora_hf.lora.variants.tokens import BASE_KEY, FILE_KEY

logger = logging.getLogger(__name__)


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises an AdapterError that lists missing, extra and wrongly shaped tensors, five of each kind."""
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


def check_tokenizer(folder: Path, tokenizer: Mapping[str, str]) -> bool:
    """Whether the adapter is known to be trained with the tokenizer whose identity is `tokenizer`.

    Warns if the adapter records no tokenizer.

    Raises:
        AdapterError: the adapter was trained with another tokenizer.
    """
    trained = read_adapter_config(folder)[1].tokenizer
    if not trained:
        logger.warning(
            "%s records no tokenizer, so lora_hf cannot check that %s encodes texts as in training",
            folder,
            tokenizer["name"] or "this tokenizer",
        )
        return False
    if trained["sha256"] != tokenizer["sha256"]:
        raise AdapterError(
            f"{folder} was trained with the tokenizer {trained['name']!r} ({trained['sha256'][:12]}); expected one "
            f"that encodes texts as it does, found {tokenizer['name']!r} ({tokenizer['sha256'][:12]}). Put the "
            f"{RUN_CONFIG_FILE} of its run, which names its tokenizer, into the adapter's folder, or restore the "
            "tokenizer's files"
        )
    return True


def trains_biases(file: AdapterFile) -> bool:
    return file.config.get("bias", "none") != "none"


def in_head(model: PreTrainedModel, key: str) -> bool:
    return key.startswith(tuple(f"{PREFIX}{path}." for path in adapter_heads(model)))


def without_copies(model: PreTrainedModel, file: AdapterFile) -> AdapterFile:
    """The file without PEFT's duplicates: of the modules that it holds whole, of base embeddings and of token rows."""
    file = _with_whole_embeddings(model, file)
    whole = modules_in_file(model, file)
    parts = () if file.metadata.fingerprint else ("modules_to_save.", "original_module.")
    copies = tuple(f"{PREFIX}{path}.{part}" for path in whole for part in parts)
    owned = tuple(f"{PREFIX}{path}." for path in whole)
    layers = adaptable_modules(model)
    rows = {f"{PREFIX}{path}.{FILE_KEY}" for path in token_rows_in_file(model, file)}
    tensors = {
        key: tensor
        for key, tensor in file.tensors.items()
        if not key.startswith(copies)
        and (key.startswith(owned) or not is_base(layers, key.removeprefix(PREFIX), tensor))
        and not _repeats(key, file.tensors, rows)
    }
    return replace(file, tensors=tensors)


def _repeats(key: str, tensors: Mapping[str, torch.Tensor], rows: set[str]) -> bool:
    """Whether a key holds the token rows of another one, as that of a head that is tied to the embeddings does."""
    if key in rows or not key.endswith(f".{FILE_KEY}"):
        return False
    return any(each in tensors and torch.equal(tensors[key], tensors[each]) for each in rows)


def _with_whole_embeddings(model: PreTrainedModel, file: AdapterFile) -> AdapterFile:
    """The file with whole embeddings in place of PEFT's `trainable_token_indices` of a resized vocabulary.

    The base lacks the new rows, so PEFT saves its own embeddings beside the trained rows.
    """
    saved = [path for path in new_embeddings(model) if f"{PREFIX}{path}.{FILE_KEY}" in file.tensors]
    ids = next(iter(token_rows_in_file(model, file).values()), [])
    if not saved or not ids:
        return file
    tensors = dict(file.tensors)
    for path in saved:
        rows, weight = tensors.pop(f"{PREFIX}{path}.{FILE_KEY}"), tensors.pop(f"{PREFIX}{path}.{BASE_KEY}", None)
        if weight is None or rows.shape != (len(ids), *weight.shape[1:]) or max(ids) >= len(weight):
            return file  # `check_fit` says what is wrong
        tensors[f"{PREFIX}{path}.weight"] = weight.index_copy(0, torch.tensor(ids), rows.to(weight))
    return replace(file, config=file.config | {"trainable_token_indices": None}, tensors=tensors)


def new_heads(model: PreTrainedModel, file: AdapterFile, own_head: bool) -> dict[str, nn.Module]:
    """Copies of the modules that the file holds whole, by path; with `own_head` the output layer gets its labels.

    A head that the file does not hold is expected as well, unless the base's own comes from its checkpoint.
    """
    paths = modules_in_file(model, file)
    missing = [path for path in modules_to_train(model) if is_random(model, path)]
    heads: dict[str, nn.Module] = {}
    for path in outermost(model, [*paths, *missing]):
        heads[path] = unpack_quantized(copy.deepcopy(plain_module(model, path)))
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


def labels_of(switch: AdapterState, file: AdapterFile, heads: Mapping[str, nn.Module]) -> Labels:
    """The adapter's labels: from its file, else from the base, else transformers' default names."""
    metadata, base = file.metadata, switch.labels[None]
    if metadata.num_labels is not None:
        return metadata.labels, metadata.problem_type
    if not heads:
        return base
    count = [len(value) for value in list(heads.values())[-1].state_dict().values()][-1]
    return base if len(base[0]) == count else (tuple(f"LABEL_{index}" for index in range(count)), None)


def check_fit(
    model: PreTrainedModel, file: AdapterFile, heads: Mapping[str, nn.Module], own_head: bool
) -> tuple[list[SavedLayer], dict[str, nn.Module]]:
    """Checks the file, without copies, against the model.

    Returns:
        Its layers, and the modules of which it trains only the bias.
    """
    if not own_head:
        _check_labels(model, file)
    _check_vocabulary(model, file)
    owned = tuple(f"{path}." for path in heads)  # PEFT adapts no module that it trains fully
    modules = {path: each for path, each in adaptable_modules(model).items() if not f"{path}.".startswith(owned)}
    layers = read_layers(modules, file)
    paths = [layer.path for layer in layers]
    check_no_standalone_biases(model, paths)
    biases = unadapted_biases(model, paths, heads) if file.config.get("bias") == "all" else {}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        expected = expected_shapes(
            modules[layer.path],
            layer.r,
            bool(file.config.get("use_dora")),
            trains_biases(file),
            bool(file.config.get("lora_bias")),
        )
        shapes |= {f"{PREFIX}{layer.path}.{key}": shape for key, shape in expected.items()}
    for path, module in biases.items():
        shapes[f"{PREFIX}{path}.bias"] = tuple(module.bias.shape)  # type: ignore[union-attr]
    for path, head in heads.items():
        shapes |= {f"{PREFIX}{path}.{key}": tuple(value.shape) for key, value in head.state_dict().items()}
    for path, ids in token_rows_in_file(model, file).items():
        hidden = plain_module(model, path).weight.shape[1]  # type: ignore[union-attr]
        shapes[f"{PREFIX}{path}.{FILE_KEY}"] = (len(ids), int(hidden))  # type: ignore[arg-type]
    check_shapes(shapes, file.tensors, f"{file.folder}/{WEIGHTS_FILE}")
    for layer in layers:
        b = file.tensors[f"{PREFIX}{layer.path}.{factor_keys(modules[layer.path])[1]}"]
        if sum(int(block.count_nonzero()) for block in diagonal_blocks(b, layer.slices)) != int(b.count_nonzero()):
            raise AdapterError(f"{file.folder}: {layer.path}.lora_B is not zero outside its slices {layer.slices}")
    if file.metadata.fingerprint:
        check_base(model, file.metadata.fingerprint, str(file.folder))
    return layers, biases


def _check_vocabulary(model: PreTrainedModel, file: AdapterFile) -> None:
    tokens: Any = input_embeddings(model)
    path = next((path for path in plain_paths(model) if plain_module(model, path) is tokens), None)
    held = file.tensors.get(f"{PREFIX}{path}.weight")
    if held is not None and held.ndim == 2 and len(held) != len(tokens.weight):
        raise AdapterError(
            f"{file.folder} holds a vocabulary of {len(held)} tokens, and the base has {len(tokens.weight)}: call "
            f"resize_token_embeddings({len(held)}) on the base before load_adapter"
        )
    new = new_embeddings(model)
    lacking = [each for each in new if f"{PREFIX}{each}.weight" not in file.tensors]
    if lacking and path in new:  # otherwise the vocabulary is the checkpoint's, which has no output head
        raise AdapterError(
            f"{file.folder} and the base's checkpoint both lack the rows of new tokens in {' and '.join(lacking)}, so "
            "they are random. Save the resized base that the adapter was trained on with save_pretrained, and load the "
            "adapter onto that"
        )


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
    if are_named(names) and are_named(metadata.labels) and names != metadata.labels:
        raise AdapterError(
            f"{file.folder} was trained for the labels {', '.join(metadata.labels)}; this model has {', '.join(names)}"
        )
