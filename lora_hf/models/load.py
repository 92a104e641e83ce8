"""Loads base models and tokenizers from the hub, a local folder or the package, and quantizes them."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.models.auto import modeling_auto as auto_names
from transformers.pytorch_utils import Conv1D

from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import ConfigError, HubError, ModelError, UserError, did_you_mean
from lora_hf.core.hub_access import hub_is_reachable, hub_unreachable
from lora_hf.data.tasks.base import ModelKind, Task
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.checkpoint_header import quiet_transformers
from lora_hf.lora.fingerprint import fingerprint, store_fingerprint
from lora_hf.lora.heads import head_paths, mark_head_as_new, sort_new
from lora_hf.lora.inject import lora_layers
from lora_hf.lora.kernels.dropout import MaskedDropout
from lora_hf.lora.precision import cast_leftovers, flush_denormals, resolve_precision
from lora_hf.lora.quantization import SCHEMES, QuantisedLinear
from lora_hf.models.config_size import check_layers, check_size
from lora_hf.models.load_errors import cannot_load, not_a_base
from lora_hf.models.model_ids import BUNDLED, HUB_IDS, check_model_exists, suggest_model

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parent / "bases"

_ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_ROBERTA |= {"layer_norm_eps": 1e-5, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
# The published shapes, so that `init: random` needs no hub. Other settings are the defaults of the model type.
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

# The attributes of configs that hold a dropout probability: `attention_dropout`, `dropout_rate`, `resid_pdrop`, ...
DROPOUT = re.compile("dropout|pdrop")

LEAK = 1e-3  # of the largest logit: what a later token changes at most, where rounding depends on it

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

AUTO_CLASSES: dict[ModelKind, type] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}

# The model types of each kind, and the values of task.kind that need it.
MODEL_TYPES: dict[ModelKind, tuple[Any, tuple[str, ...]]] = {
    "sequence-classification": (
        auto_names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ("classification", "multi_label", "regression"),
    ),
    "token-classification": (auto_names.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, ("tokens",)),
    "question-answering": (auto_names.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, ("question_answering",)),
    "causal-lm": (auto_names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ("generation", "chat")),
    "seq2seq-lm": (auto_names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, ("seq2seq",)),
}
TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "*.model", "*.spm", "*.bpe*")
GENERATORS: tuple[ModelKind, ...] = ("causal-lm", "seq2seq-lm")

T = TypeVar("T")


def load_base(model: ModelConfig, task: Task, seed: int = 0) -> PreTrainedModel:
    """Loads the base model with a new head for the task, drawn from `seed`; `init: random` draws all weights.

    Raises:
        ModelError: no such model, damaged files, or files without some weights of the base.
        HubError: the model is only on the hub, and the hub is out of reach.
        ConfigError: `model.quantised` needs a package that is not installed.
    """
    return load_model(model, task.model_kind, task.head_config(), seed)


@flush_denormals()
def load_model(
    model: ModelConfig, kind: ModelKind, head: dict[str, Any] | None = None, seed: int = 0
) -> PreTrainedModel:
    """`load_base` without a task: a model of the given kind, with the config values in `head`.

    Raises:
        ModelError, HubError: as `load_base`.
    """
    if reason := not_a_base(model.name):
        raise ModelError(reason)
    auto: Any = AUTO_CLASSES[kind]
    dtype = DTYPES[resolve_precision(model.precision)]
    config = read_config(model, head or {})
    _check_kind(config, kind, model.name)
    torch.manual_seed(seed)
    _check_padding(config, model.name)
    check_size(auto, config, dtype, model.name)
    base = _random(auto, model, config, dtype) if model.init == "random" else _pretrained(auto, model, config, dtype)
    cast_leftovers(base, dtype)
    if kind == "causal-lm" and config.model_type not in ARCHITECTURES:
        _check_causal(base, model.name)
    _use_faster_kernels(base)
    if model.init == "random":
        mark_head_as_new(base)
    base.name_or_path = model.name
    return quantise(base, model.quantised) if model.quantised else base


def quantise(model: PreTrainedModel, scheme: str, dynamic: bool = False) -> PreTrainedModel:
    """Quantizes the projections of the base's layers in place. Embeddings, norms, pooler and head keep their dtype.

    The model keeps the fingerprint of its original weights, so that adapters accept the base in either form.

    Args:
        scheme: `int8` or `nf4`.
        dynamic: with `int8`, also quantize the inputs and multiply integers. This is for inference on a CPU, without
            unmerged adapters.

    Raises:
        ConfigError: no such scheme, or its package is not installed.
        ModelError: the model has adapters, is already quantized, or has no projection to quantize.
    """
    if scheme not in SCHEMES or (dynamic and scheme != "int8"):
        known = "int8" if dynamic else ", ".join(SCHEMES)
        raise ConfigError(f"quantise: expected {known}, found {scheme!r}{did_you_mean(scheme, SCHEMES)}")
    if lora_layers(model) or quantised_layers(model):
        raise ModelError("quantise: expected a plain base, found adapters or packed weights; quantise before inject")
    # Only numbered layers, and no subclasses of Linear: their modules read the weight directly.
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
    """Converts every quantized projection, also adapted ones, to `dtype` in place. Other weights keep their dtype.

    Raises:
        ModelError: an adapter is merged; unmerge could not restore the quantized weights afterwards.
    """
    if any(layer.merged for layer in lora_layers(model).values()):
        raise ModelError("dequantise: an adapter is merged; call unmerge first, and merge again afterwards")
    for path, layer in quantised_layers(model).items():
        model.set_submodule(path, layer.plain(dtype))
    return model


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Every quantized projection by its module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that `model.tokenizer` names, by default the model's own.

    Raises:
        ModelError, HubError: as `load_base`.
    """
    name = model.tokenizer or model.name
    revision = model.revision if model.tokenizer is None else None
    folder = Path(name)
    if (folder / "config.json").is_file() and not any(
        file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)
    ):
        raise ModelError(
            f"{name}: the folder holds no tokenizer; add it with tokenizer.save_pretrained({name!r}), or name one "
            "with model.tokenizer"
        )
    tokenizer = _from_pretrained(name, revision, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{name}: the tokenizer has neither a padding token (pad_token) nor an end token (eos_token), and "
                "batches need one of them. Set pad_token in tokenizer_config.json, or name another tokenizer with "
                "model.tokenizer"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = name
    return tokenizer


def read_config(model: ModelConfig, head: Mapping[str, Any]) -> PretrainedConfig:
    """The config of the base, with the values in `head`; for `init: random`, of a published shape without the hub.

    Raises:
        ModelError, HubError: as `load_base`.
    """
    short = next((short for short, full in HUB_IDS.items() if full == model.name), model.name)
    if model.init == "random" and short in SHAPES and not Path(model.name).is_dir():
        shape = dict(SHAPES[short])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape, **head)
    else:
        values, _ = _from_pretrained(model.name, model.revision, PretrainedConfig.get_config_dict)
        check_layers(values, model.name)
        config = _from_pretrained(model.name, model.revision, functools.partial(AutoConfig.from_pretrained, **head))
    if model.dropout is not None:
        set_dropout(config, model.dropout)
    return config


def set_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Sets every dropout probability of a config; one that is None keeps following another."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        values = {"classifier_dropout": 0.1} | part.to_dict()  # what a token classifier takes if its config has none
        numbers = [key for key, value in values.items() if type(value) in (int, float)]
        part.update({key: dropout for key in numbers if DROPOUT.search(key)})


def _check_kind(config: PretrainedConfig, kind: ModelKind, name: str) -> None:
    """Raises ModelError for a model of another kind than the task needs, with the values of task.kind that it fits."""
    fitting: list[ModelKind] = [each for each in MODEL_TYPES if _fits(config, each)]
    if kind in fitting or not fitting:  # a type that a user has registered is for transformers to judge
        return
    texts: list[ModelKind] = [each for each in GENERATORS if each in fitting]
    chosen: list[ModelKind] = texts if texts and kind in GENERATORS else fitting
    asked = " or ".join(MODEL_TYPES[kind][1])
    expected = " or ".join(value for each in chosen for value in MODEL_TYPES[each][1])
    raise ModelError(
        f"{name}: {config.model_type} is {_form(config)}, which a task of kind {asked} cannot use; expected "
        f"task.kind={expected}, or another model"
    )


def _fits(config: PretrainedConfig, kind: ModelKind) -> bool:
    # Parts of encoder-decoders, and encoders that see the token they should predict, also load as causal models.
    is_decoder = _form(config) == "a decoder" or getattr(config, "is_decoder", False)
    return config.model_type in MODEL_TYPES[kind][0] and (kind != "causal-lm" or is_decoder)


def _form(config: PretrainedConfig) -> str:
    if config.is_encoder_decoder:
        return "an encoder-decoder"
    architecture = ARCHITECTURES.get(config.model_type)
    masked = config.model_type in auto_names.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "a decoder" if (architecture.causal if architecture else not masked) else "an encoder"


@torch.no_grad()
def _check_causal(model: PreTrainedModel, name: str) -> None:
    """Raises ModelError if a token's logits depend on a later token, as in XLNet: it would be trained to copy it."""
    ids = torch.arange(4).expand(2, 4).clone()
    ids[1, -1] = 0
    training = model.training
    one, other = model.eval()(input_ids=ids).logits[:, :-1].float()  # type: ignore[operator]
    model.train(training)
    if (one - other).abs().max() > LEAK * (one - one.mean()).abs().max():
        raise ModelError(
            f"{name}: {model.config.model_type} reads the tokens after the one that it predicts, so it cannot learn to "
            "continue a text; expected a causal language model"
        )


def _check_padding(config: PretrainedConfig, name: str) -> None:
    """Removes a padding token that has no embedding, such as Llama's -1: a tokenizer brings its own (`align`)."""
    text = config.get_text_config()
    pad, vocabulary = text.pad_token_id, getattr(text, "vocab_size", None)
    if pad is not None and (not vocabulary or 0 <= pad < vocabulary):
        return
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is not None and architecture.counts_from_padding:
        raise ModelError(
            f"{name}: config.json has the pad_token_id {pad}, but {config.model_type} counts positions from it; "
            f"expected the id with which it was trained, below {vocabulary}"
        )
    config.pad_token_id = text.pad_token_id = None


def _random(auto: Any, model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return auto.from_config(config, dtype=dtype)
    except Exception as error:  # transformers does not check a config
        raise cannot_load(model.name, error) from error


def _use_faster_kernels(base: PreTrainedModel) -> None:
    """Replaces GPT-2's `gelu_new`, eight elementwise operations, with torch's kernel; makes its dropout faster."""
    for module in base.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
            elif type(child) is torch.nn.Dropout:
                setattr(module, name, MaskedDropout(child.p).train(child.training))


def _pretrained(auto: Any, model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    load = functools.partial(
        auto.from_pretrained, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # transformers warns at length about the new head; the check below reports the weights that must not be missing.
    with quiet_transformers():
        base, info = _from_pretrained(model.name, model.revision, load)
    _check_filled(base, info, model.name)
    return base


def _check_filled(base: PreTrainedModel, info: dict[str, Any], name: str) -> None:
    """Warns of what the checkpoint did not fill besides a new head; raises ModelError where that is the base itself."""
    head = tuple(f"{path}." for path in head_paths(base))
    shapes = {str(key): (tuple(held), tuple(expected)) for key, held, expected in info["mismatched_keys"]}
    mismatched = set(shapes)
    unfilled = {key for key in info["missing_keys"] if not key.startswith(head)} - mismatched
    new, missing = sort_new(base, unfilled, strict=True)
    wrong = sorted(key for key in mismatched if not key.startswith(head))
    if missing or wrong:
        others = [f"{key}: {shapes[key][0]} instead of {shapes[key][1]}" for key in wrong[:3]]
        unknown = sorted(info["unexpected_keys"])
        held = f", {len(unknown)} of a name that it does not have ({', '.join(unknown[:2])})" if unknown else ""
        raise ModelError(
            f"{name}: the weights do not fill this model with num_labels={base.config.num_labels}: "
            f"{len(missing)} missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(wrong)} of another shape ({'; '.join(others) or '-'}){held}; expected the config.json that these "
            "weights were saved with"
        )
    left_out = sorted(key for key in info["unexpected_keys"] if re.search(r"\.\d+\.", key))
    if left_out:
        logger.warning(
            "%s: the checkpoint holds %d tensors of layers that %s does not have, such as %s; they are left out. If "
            "the model should have them, restore the config.json that these weights were saved with",
            name, len(left_out), type(base).__name__, left_out[0],
        )  # fmt: skip
    if mismatched:
        logger.warning(
            "%s: its own head has another shape (%s); a new one is trained", name, ", ".join(sorted(mismatched))
        )
    if new:
        logger.warning("%s does not hold %s: trained and saved with the adapter", name, ", ".join(dict.fromkeys(new)))


def _from_pretrained(name: str, revision: str | None, load: Callable[..., T]) -> T:
    """Calls `load`, a `from_pretrained`, with the folder or hub id that `name` refers to, and explains its errors."""
    source, options = name, {}
    if name in BUNDLED:
        source = str(BUNDLED_FOLDER / name)
    elif not Path(name).is_dir():
        check_model_exists(name)
        source = HUB_IDS.get(name, name)
        options = {"revision": revision, "local_files_only": not hub_is_reachable()}
    try:
        return load(source, trust_remote_code=False, **options)  # False: neither run a base's own code nor ask to
    except UnpicklingError as error:
        raise ModelError(
            f"{name}: refused: its pickled weights contain more than tensors. None of their code was run; expected "
            "model.safetensors"
        ) from error
    except UserError:
        raise
    except Exception as error:  # transformers checks neither the configs nor the files of a base
        if options.get("local_files_only") and isinstance(error, OSError):  # other errors are about files that are here
            raise HubError(
                f"{name}{suggest_model(name)}: {hub_unreachable()}, and the local cache does not hold this model. Set "
                f"model.name to a local folder or to a bundled base ({', '.join(BUNDLED)}), or set HF_ENDPOINT to a "
                "mirror"
            ) from error
        raise cannot_load(name, error, revision) from error
