"""Base models and tokenizers: from the hub, a local folder, or the bases that come with the package."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import ConfigError, HubError, ModelError, did_you_mean
from lora_hf.core.hub_access import hub_is_reachable
from lora_hf.data.tasks.base import Task
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.fingerprint import fingerprint, store_fingerprint
from lora_hf.lora.inject import lora_layers
from lora_hf.lora.precision import flush_denormals, resolve_precision
from lora_hf.lora.quantization import SCHEMES, QuantisedLinear
from lora_hf.models.model_ids import EMBEDDED, HUB_IDS, check_model_exists, suggest_model

EMBEDDED_FOLDER = Path(__file__).parent / "bases"

_ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_ROBERTA |= {"layer_norm_eps": 1e-5, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
# The published shapes, so that `init: random` needs no hub: what is not named is the model type's default.
SHAPES: dict[str, dict[str, Any]] = {
    "roberta-base": _ROBERTA,
    "roberta-large": {
        **_ROBERTA,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "gpt2": {"model_type": "gpt2"},
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What the model types call the probabilities of their dropouts.
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
    "pooler_dropout",
)

Loaded = TypeVar("Loaded")


def load_base(model: ModelConfig, task: Task, seed: int = 0) -> PreTrainedModel:
    """The base model with a fresh head for the task, drawn from `seed`; with `init: random` all weights are.

    Raises:
        ModelError: no such model, damaged files, or weights that lack part of the base.
        HubError: it is only on the hub, and the hub is out of reach.
        ConfigError: `model.quantised` needs a package that is not installed.
    """
    if task.model_kind != "sequence-classification":
        return load_model(model, None, seed)
    head: dict[str, Any] = {"num_labels": task.num_labels, "problem_type": task.problem_type}
    labels = task.label_names
    if labels:
        head |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return load_model(model, head, seed)


@flush_denormals()
def load_model(model: ModelConfig, head: dict[str, Any] | None, seed: int = 0) -> PreTrainedModel:
    """`load_base` without a task: a classifier whose config says what `head` does, or else a causal language model.

    Raises:
        ModelError, HubError: as `load_base`.
    """
    auto: Any = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    dtype = DTYPES[resolve_precision(model.precision)]
    config = _config(model, head or {})
    torch.manual_seed(seed)
    base = auto.from_config(config, dtype=dtype) if model.init == "random" else _pretrained(auto, model, config, dtype)
    _fuse_activations(base)
    base.name_or_path = model.name
    if base.config.pad_token_id is None:
        base.config.pad_token_id = base.config.eos_token_id
    return quantise(base, model.quantised) if model.quantised else base


def quantise(model: PreTrainedModel, scheme: str, dynamic: bool = False) -> PreTrainedModel:
    """Packs the projections of the base's layers, in place; embeddings, norms, pooler and head stay as they are.

    The fingerprint stays that of the weights before, so that adapters find the base in either form.

    Args:
        scheme: `int8` or `nf4`.
        dynamic: with int8, round inputs to 8 bits too and multiply integers: for inference on a CPU, with no adapter
            beside the projections.

    Raises:
        ConfigError: no such scheme, or its package is not installed.
        ModelError: the model has adapters already, is quantised already, or has no projection to pack.
    """
    if scheme not in SCHEMES or (dynamic and scheme != "int8"):
        known = "int8" if dynamic else ", ".join(SCHEMES)
        raise ConfigError(f"quantise: expected {known}, found {scheme!r}{did_you_mean(scheme, SCHEMES)}")
    if lora_layers(model) or quantised_layers(model):
        raise ModelError("quantise: expected a plain base, found adapters or packed weights; quantise before inject")
    # A layer's path holds its number; subclasses of Linear belong to modules that read their weight themselves.
    layers = {
        path: module
        for path, module in model.base_model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and re.search(r"\.\d+\.", f".{path}")
    }
    if not layers:
        raise ModelError(f"quantise: {model.config.model_type} has no nn.Linear or Conv1D in numbered layers")
    before = fingerprint(model)
    for path, layer in layers.items():
        model.base_model.set_submodule(path, QuantisedLinear(layer, scheme, dynamic))
    store_fingerprint(model, before)
    return model


def dequantise(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Unpacks every quantised projection, in place, adapted ones too; the other weights keep their precision.

    Raises:
        ModelError: an adapter is merged, which unmerge could then no longer take out.
    """
    if any(layer.merged for layer in lora_layers(model).values()):
        raise ModelError("dequantise: an adapter is merged; call unmerge first, and merge again afterwards")
    for path, layer in quantised_layers(model).items():
        model.set_submodule(path, layer.plain(dtype))
    return model


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Every packed projection by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one that `model.tokenizer` names.

    Raises:
        ModelError, HubError: as `load_base`.
    """
    name = model.tokenizer or model.name
    revision = model.revision if model.tokenizer is None else None
    tokenizer = _from_place(name, revision, lambda place, **more: AutoTokenizer.from_pretrained(place, **more))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _fuse_activations(base: PreTrainedModel) -> None:
    """GPT-2's `gelu_new` is eight elementwise operations; torch's own kernel of the same formula is one."""
    for module in base.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def _config(model: ModelConfig, head: dict[str, Any]) -> PretrainedConfig:
    # The published short name and the hub's own id name the same shape.
    short = next((short for short, full in HUB_IDS.items() if full == model.name), model.name)
    if model.init == "random" and short in SHAPES and not Path(model.name).is_dir():
        shape = dict(SHAPES[short])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape, **head)
    else:
        config = _from_place(
            model.name, model.revision, lambda place, **more: AutoConfig.from_pretrained(place, **head, **more)
        )
    if model.dropout is not None:
        config.update({name: model.dropout for name in DROPOUTS if hasattr(config, name)})
    return config


def _pretrained(auto: Any, model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    def load(place: str, **more: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        # transformers reports the fresh head as missing, on several lines; what must not be missing is checked below.
        verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            return auto.from_pretrained(
                place, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **more
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()

    base, info = _from_place(model.name, model.revision, load)
    architecture = ARCHITECTURES.get(base.config.model_type)
    heads = architecture.head if architecture else ("classifier", "score")
    lost = sorted(key for key in info["missing_keys"] if key.split(".")[0] not in heads)
    wrong = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if lost or wrong:
        raise ModelError(
            f"{model.name}: the weights do not fill this model with num_labels={config.num_labels}: "
            f"{len(lost)} missing ({', '.join(lost[:3]) or '-'}), {len(wrong)} of another shape "
            f"({', '.join(wrong[:3]) or '-'})"
        )
    return base


def _from_place(name: str, revision: str | None, load: Callable[..., Loaded]) -> Loaded:
    """Calls `load` with the place that `name` means, telling its failures in our words."""
    place, more = _place(name, revision)
    try:
        # Code that comes with a base is never run, and nobody is asked whether it should be.
        return load(place, trust_remote_code=False, **more)
    except UnpicklingError as error:
        raise ModelError(
            f"{name}: refused: its pickled weights ask for more than tensors. Nothing of them was run; expected "
            "model.safetensors"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        if more.get("local_files_only"):
            raise HubError(
                f"{name}{suggest_model(name)}: the hub is out of reach and this model is not in the local cache. Give "
                f"model.name a local folder, or one of the embedded bases ({', '.join(EMBEDDED)}), or set HF_ENDPOINT "
                "to a mirror"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name}: cannot be loaded: {reason}{suggest_model(name)}") from error


def _place(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    if name in EMBEDDED:
        return str(EMBEDDED_FOLDER / name), {}
    if Path(name).is_dir():
        return name, {}
    check_model_exists(name)
    hub = HUB_IDS.get(name, name)
    return hub, {"revision": revision, "local_files_only": not hub_is_reachable()}
