"""Saves one adapter of a model in PEFT's format, and loads it back strictly.

Loading compares the file with what the model itself expects before it changes the model. A missing or extra tensor, a
wrong shape, another base or other labels raises AdapterError and leaves the model unchanged.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.fit import (
    check_fit,
    check_shapes,
    check_tokenizer,
    in_head,
    labels_of,
    new_heads,
    trains_biases,
    without_copies,
)
from lora_hf.adapters.format import WEIGHTS_FILE, AdapterFile, AdapterMetadata, read_adapter, write_adapter
from lora_hf.adapters.peft_config import (
    PREFIX,
    SavedLayer,
    base_dependent_init,
    from_peft,
    peft_config,
    read_layers,
    to_peft,
    token_rows_in_file,
)
from lora_hf.adapters.resolve import SavedModel, fetch_adapter
from lora_hf.core.errors import AdapterError
from lora_hf.lora.fingerprint import check_base, fingerprint
from lora_hf.lora.heads import has_labels, new_embeddings, plain_module
from lora_hf.lora.inject import (
    adapter_heads,
    adapter_names,
    adapter_state,
    add_weights,
    eject,
    get_labels,
    inject_head,
    lora_layers,
    merge,
    prepare_for_adapter,
    set_adapter,
)
from lora_hf.lora.layers import LoraLinear
from lora_hf.lora.target_modules import adaptable_modules
from lora_hf.lora.variants.biases import (
    add_biases,
    load_standalone_biases,
    standalone_biases,
)
from lora_hf.lora.variants.dora import DoraWeights
from lora_hf.lora.variants.table import Variant, initialise
from lora_hf.lora.variants.tokens import FILE_KEY, add_token_rows, token_rows
from lora_hf.lora.wrappers import on_unwrapped_model
from lora_hf.models.align import align_tokenizer
from lora_hf.models.load import dequantise, load_base, load_tokenizer, quantise
from lora_hf.models.tokenizer_identity import tokenizer_identity

logger = logging.getLogger(__name__)


@on_unwrapped_model(changes=False, plain_paths=True)
def save_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    name: str = "default",
    task: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Writes adapter `name` with its task head to `folder`, and returns the folder.

    Args:
        task: the name of the task that the adapter was trained for. `eval`, `predict` and `generate` need it.
        tokenizer: the tokenizer of the training texts. With any other one, loading the adapter fails.

    Raises:
        AdapterError: the model has no adapter of that name, or DeepSpeed has partitioned its tensors.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    if name not in adapter_state(model).names:
        raise AdapterError(f"no adapter {name!r} on this model; it has: {', '.join(adapter_names(model)) or 'none'}")
    # As copies: the two may be one tensor, which a safetensors file cannot hold under two names.
    heads = {path: copy.deepcopy(plain_module(model, path)) for path in new_embeddings(model)}
    heads |= {
        path: head.modules_to_save[name] for path, head in adapter_heads(model).items() if name in head.modules_to_save
    }
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in to_peft(layer, name).items()}
    biases = standalone_biases(model, name, PREFIX)
    tensors |= biases
    for path, head in heads.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in head.state_dict().items()}
    rows = token_rows(model, name)
    tensors |= {f"{PREFIX}{path}.{FILE_KEY}": own.rows for path, own in rows.items()}
    if empty := next((key for key, value in tensors.items() if not value.numel()), None):
        raise AdapterError(
            f"{empty} is empty, as DeepSpeed's ZeRO-3 leaves the parameters of other processes. Gather them first: "
            "with deepspeed.zero.GatheredParameters(list(model.parameters())): save_adapter(...)"
        )
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
        tokenizer=tokenizer_identity(tokenizer) if tokenizer is not None else {},
        slices={layer.path: [list(pair) for pair in layer.slices] for layer in saved_layers},
        start=next((weights.start for weights in all_weights), ""),
    )
    lora_biases = any(weights.bias is not None for weights in all_weights)
    variant = {
        "lora_dropout": max((weights.lora_dropout for weights in all_weights), default=0.0),
        "use_rslora": any(weights.use_rslora for weights in all_weights),
        "bias": "all" if biases else "lora_only" if lora_biases else "none",
        "use_dora": any(isinstance(weights, DoraWeights) for weights in all_weights),
        "lora_bias": any(weights.lora_bias is not None for weights in all_weights),
        "trainable_token_indices": {path: own.ids.tolist() for path, own in rows.items()} or None,
    }
    config = peft_config(model, saved_layers, list(heads), metadata) | variant
    if config.get("target_parameters") and config["lora_dropout"]:
        logger.warning(
            "lora_dropout=%g is not saved in %s: PEFT has no dropout for target_parameters, which name the projections "
            "that PEFT would take for experts. This matters only for further training",
            config["lora_dropout"],
            folder,
        )
        config["lora_dropout"] = 0.0
    write_adapter(Path(folder), config, tensors, metadata)
    return Path(folder)


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    name: str = "default",
    own_head: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """`pretrained.load_adapter`, without changing what `save_pretrained` does."""
    prepare_for_adapter(model, name)
    file = without_copies(model, read_adapter(fetch_adapter(folder, revision)))
    heads = new_heads(model, file, own_head)
    saved_layers, biases = check_fit(model, file, heads, own_head)
    init, holds_init = base_dependent_init(file)
    use_rslora, dropout = bool(file.config.get("use_rslora")), file.config.get("lora_dropout", 0.0)
    variant = Variant(
        use_rslora,
        bool(file.config.get("use_dora")),
        init,
        trains_biases(file),
        bool(file.config.get("lora_bias")),
    )
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
    rows = token_rows_in_file(model, file)
    add_token_rows(model, rows, name, switch)
    for path, own in token_rows(model, name).items():
        own.rows.data.copy_(file.tensors[f"{PREFIX}{path}.{FILE_KEY}"])
    if has_labels(model):
        switch.labels[name] = labels_of(switch, file, heads)
    inject_head(model, name, heads)
    _load_heads(model, file, name)
    if not file.metadata.fingerprint:
        logger.warning(
            "%s: PEFT records no fingerprint of the base, so lora_hf cannot check that it was trained on these weights",
            folder,
        )
    layers = lora_layers(model)
    if saved_layers and not any(layers[saved.path].adapters[name].moved() for saved in saved_layers):
        logger.warning("%s: lora_B is zero in every module, so this adapter changes no projection", folder)
    return set_adapter(model, name)


def restore_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default") -> None:
    """Copies the tensors in `folder`, a checkpoint of the same run, into adapter `name` of the model."""
    file = without_copies(model, read_adapter(folder))
    copy_lora_weights(model, file, name)
    _load_heads(model, file, name)


def copy_lora_weights(model: PreTrainedModel, file: AdapterFile, name: str = "default") -> None:
    """Copies A and B, without the head, into adapter `name` of the model.

    Raises:
        AdapterError: the file has other modules, another rank or another variant than adapter `name`.
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
    found = {key: tensor for key, tensor in without_copies(model, file).tensors.items() if not in_head(model, key)}
    check_shapes(shapes, found, f"{file.folder}/{WEIGHTS_FILE}")
    _warn_of_another_scaling(model, layers, file, name)
    for path, layer in layers.items():
        from_peft(layer, name, file.tensors, f"{PREFIX}{path}")
    load_standalone_biases(model, name, file.tensors, PREFIX)


def _warn_of_another_scaling(
    model: PreTrainedModel, layers: dict[str, LoraLinear], file: AdapterFile, name: str
) -> None:
    """Warns of the first layer whose `lora_alpha`, and so its initial update, differs from the file's."""
    for saved in read_layers(adaptable_modules(model), file):
        weights = layers[saved.path].adapters[name]
        _, alpha = saved.adapter_rank_and_alpha(weights.use_rslora)
        if not math.isclose(alpha, weights.lora_alpha):
            logger.warning(
                "%s was trained with lora_alpha=%g, and this adapter has %g (%s): the initial update is %g times as "
                "large as in that adapter",
                file.folder, alpha, weights.lora_alpha, saved.path, weights.lora_alpha / alpha,
            )  # fmt: skip
            return


def load_saved_model(
    saved: SavedModel, precision: str, adapted: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an adapter on its base, or a full model, and its tokenizer: in evaluation mode, on the GPU if there is one.

    Args:
        precision: the precision of the base or the full model, as in a config. LoRA and the head are always fp32.
            `int8` is for inference on the CPU: it merges the adapter and multiplies the projections in integers.
        adapted: False loads the base without the adapter, which a full model does not have.

    Raises:
        AdapterError: the adapter is damaged, does not fit the base, or was trained with another tokenizer.
        ModelError, HubError: the base cannot be loaded.
    """
    dynamic = precision == "int8"
    config = replace(saved.model, precision="fp32" if dynamic else precision)  # type: ignore[arg-type]
    tokenizer = saved.task.prepare_tokenizer(load_tokenizer(config))
    model = load_base(config, saved.task, saved.seed)
    align_tokenizer(tokenizer, model)
    if adapted and not saved.is_full_model:
        load_adapter(model, saved.folder)
        check_tokenizer(saved.folder, tokenizer_identity(tokenizer))
    model.eval()
    if dynamic:
        return quantise(plain_model(dequantise(model)), "int8", dynamic=True), tokenizer
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        model.to(device)  # type: ignore[call-arg]
    return model, tokenizer


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model without LoRA layers: the active adapter is merged, and its head replaces the base's."""
    heads = {path: head.modules_to_save[head.active] for path, head in adapter_heads(model).items() if head.active}
    eject(merge(model))
    for path, head in heads.items():  # eject restores the base's head if the adapter has no LoRA layer
        model.set_submodule(path, head)
    return model


def _load_heads(model: PreTrainedModel, file: AdapterFile, name: str) -> None:
    for path, head in adapter_heads(model).items():
        if name not in head.modules_to_save:
            continue
        prefix = f"{PREFIX}{path}."
        head.modules_to_save[name].load_state_dict(
            {key.removeprefix(prefix): value for key, value in file.tensors.items() if key.startswith(prefix)}
        )
