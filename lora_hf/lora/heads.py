"""Which modules an adapter trains and saves as a whole: the task head, and whatever the checkpoint does not contain.

A model with a task head consists of its base model and the modules of the head. The head of a language model comes from
pretraining, so it stays frozen like the base. A module that is missing from the checkpoint (a classifier, sometimes a
pooler) is initialized at random by `from_pretrained`. If it stayed frozen and were not saved with the adapter, the next
process would draw other numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from lora_hf.core.errors import ConfigError, ModelError, did_you_mean
from lora_hf.lora.adapter_dict import modules_of_base
from lora_hf.lora.checkpoint_header import loaded_from_header
from lora_hf.lora.quantization import QuantisedLinear

logger = logging.getLogger(__name__)

NEW_PARAMETERS = "lora_hf_new_parameters"  # the attribute of a model with what `new_parameters` returned last
VOCABULARY = "lora_hf_vocabulary"  # and the attribute with the size of its vocabulary then
WITH_LABELS = ("SEQ_CLS", "TOKEN_CLS")

# PEFT's TaskType by the auto class that knows a model class; the first that does decides.
_TASK_TYPES = (
    ("SEQ_CLS", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ("TOKEN_CLS", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("QUESTION_ANS", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ("SEQ_2_SEQ_LM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("CAUSAL_LM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
)


def task_type(model: PreTrainedModel) -> str | None:
    """PEFT's `task_type` of the model's class; None where PEFT has none (multiple choice, masked language models)."""
    classes = {kind.__name__ for kind in type(model).__mro__}
    for name, mapping in _TASK_TYPES:
        known = {each for value in mapping.values() for each in ([value] if isinstance(value, str) else value)}
        if classes & known:
            return name
    return "FEATURE_EXTRACTION" if model.base_model is model and not _has_output_embeddings(model) else None


def has_labels(model: PreTrainedModel) -> bool:
    """Whether the model's outputs are the labels of its config."""
    return task_type(model) in WITH_LABELS


def head_paths(model: PreTrainedModel) -> list[str]:
    """The top-level modules of the task head; none for a bare base or a language model."""
    if _has_output_embeddings(model):
        return []
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if model.base_model is not model:
        return [name for name in children if getattr(model, name) is not model.base_model]
    if task_type(model) == "FEATURE_EXTRACTION":
        return []
    # Some models hold their base without a module of its own (T5ForQuestionAnswering).
    with torch.device("meta"):
        bare = AutoModel.from_config(model.config)
    return [name for name in children if not hasattr(bare, name)]


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The token embeddings; None for a model that reads no tokens, such as an image or audio model."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def embeddings_that_run(model: PreTrainedModel) -> list[str]:
    """The paths of the embeddings that an encoder-decoder calls instead of its token embeddings; else empty.

    In T5 and BART, the encoder and the decoder have embedding modules that share the weight of the module `shared`.
    """
    tokens = input_embeddings(model)
    if tokens is None:
        return []
    own = set(tokens.modules())  # also the plain module in an adapted one
    modules = [(path, each) for path, each in model.named_modules() if isinstance(each, nn.Embedding)]
    twins = [path for path, each in modules if each.weight is tokens.weight and each not in own]
    return [path.removesuffix(".base_layer") for path in twins]


def base_prefix(model: PreTrainedModel) -> str:
    """`"roberta."` for a model with a head, empty for the base model itself."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def new_parameters(model: PreTrainedModel) -> frozenset[str] | None:
    """The parameters that `from_pretrained` initialized; None if neither the model nor a checkpoint tells.

    `from_pretrained` marks the parameters that it loaded, but copies lose these marks, and `from_config` makes none.
    For such a model, the header of the checkpoint that it names decides, if that is on this machine.
    """
    if not hasattr(model, NEW_PARAMETERS):
        filled, parameters = _filled(model), _plain_parameters(model)
        if not filled:
            filled = _filled_by_checkpoint(model)
        resized = _resized_embeddings(model)
        if resized:
            logger.warning(
                "the vocabulary was resized from %d to %d tokens, and the checkpoint lacks the new rows: %s are "
                "trained and saved with the adapter",
                _saved_vocabulary(model),
                _vocabulary(model),
                ", ".join(sorted(resized)),
            )
        _remember(model, frozenset(parameters) - filled | resized if filled else None)
    elif (before := getattr(model, VOCABULARY)) != (tokens := _vocabulary(model)):
        late = _embedding_parameters(model)
        logger.warning(
            "the vocabulary was resized from %s to %s tokens after an adapter was added: %s are saved with it, but "
            "were not trained. To train them, call resize_token_embeddings before inject",
            before,
            tokens,
            ", ".join(sorted(late)),
        )
        known = getattr(model, NEW_PARAMETERS)
        _remember(model, (_head_parameters(model) if known is None else known) | late)
    return getattr(model, NEW_PARAMETERS)


def mark_head_as_new(model: PreTrainedModel) -> None:
    """Records that only the head is new, for a model whose weights are all random."""
    _remember(model, _head_parameters(model))


def new_embeddings(model: PreTrainedModel) -> list[str]:
    """The paths of the token embeddings and the output head where a resized vocabulary has made them new."""
    late = _embedding_parameters(model) & (new_parameters(model) or frozenset())
    return outermost(model, {name.rpartition(".")[0] for name in late})


def _remember(model: PreTrainedModel, new: frozenset[str] | None) -> None:
    setattr(model, NEW_PARAMETERS, new)
    setattr(model, VOCABULARY, _vocabulary(model))


def _vocabulary(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _head_parameters(model: PreTrainedModel) -> frozenset[str]:
    heads = tuple(f"{path}." for path in head_paths(model))
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(heads)) if heads else frozenset()


def _saved_vocabulary(model: PreTrainedModel) -> int | None:
    """The size of the checkpoint's vocabulary; None for a model from neither a folder nor the cache."""
    try:
        return AutoConfig.from_pretrained(model.name_or_path or "", local_files_only=True).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):
        return None


def _plain_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters without those of adapters, by their names in the plain model. Tied ones appear under each name."""
    return {
        f"{path}.{name}".replace(".original_module.", ".").replace(".base_layer.", ".").removeprefix("."): parameter
        for path, module in modules_of_base(model, remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False)
    }


def _filled(model: PreTrainedModel) -> frozenset[str]:
    """The names of the parameters that transformers has marked as loaded."""
    parameters = _plain_parameters(model)
    return frozenset(name for name, each in parameters.items() if hasattr(each, "_is_hf_initialized"))


def _filled_by_checkpoint(model: PreTrainedModel) -> frozenset[str]:
    """The parameters for which the model's checkpoint has a tensor of the same shape.

    None if there is no checkpoint, or if it lacks some of the layers: then the model is not the one in it.
    """
    loaded = loaded_from_header(model)
    if loaded is None:
        return frozenset()
    names, theirs, parameters = _filled(loaded), _plain_parameters(loaded), _plain_parameters(model)
    filled = frozenset(
        name
        for name, each in parameters.items()
        if name in names and (each.shape == theirs[name].shape or not each.is_floating_point())  # packed weights
    )
    heads = tuple(f"{path}." for path in head_paths(model))
    lacking = [name for name in parameters if name not in filled]
    if any(part.isdigit() for name in lacking if not name.startswith(heads) for part in name.split(".")):
        return frozenset()
    logger.log(
        logging.WARNING if lacking else logging.INFO,
        "this model was copied or built with from_config, so the tensor names in its checkpoint %s decide which "
        "weights are pretrained; it lacks: %s",
        model.name_or_path,
        ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in lacking)) or "none",
    )
    return filled


def _resized_embeddings(model: PreTrainedModel) -> frozenset[str]:
    """The embeddings and the output head, if the vocabulary is not the one of the checkpoint."""
    if _saved_vocabulary(model) in (None, _vocabulary(model)):
        return frozenset()
    return _embedding_parameters(model)


def _embedding_parameters(model: PreTrainedModel) -> frozenset[str]:
    """The parameters of the token embeddings and the output head, by their names in the plain model."""
    modules = {id(module) for module in (input_embeddings(model), model.get_output_embeddings())}
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if id(module) in modules]
    return frozenset(name for name in _plain_parameters(model) if name.startswith(tuple(f"{path}." for path in paths)))


def is_random(model: PreTrainedModel, path: str) -> bool:
    """Whether a module of the head may be random: it is new, or its origin is unknown."""
    new = new_parameters(model)
    return new is None or any(name.startswith(f"{path}.") for name in new)


def modules_to_train(model: PreTrainedModel, names: Sequence[str] = ()) -> list[str]:
    """The modules that an adapter fully trains and saves, by path in the order of the model.

    Args:
        names: further modules, as in `lora.modules_to_save`.

    Raises:
        ModelError: random parameters are in a numbered layer, or do not form a module of their own.
        ConfigError: a name matches no module.
    """
    heads = head_paths(model)
    chosen = {*heads, *_new_modules(model, heads), *named_modules(model, names)}
    return outermost(model, chosen)


def untrained_parameters(model: PreTrainedModel, whole: Iterable[str]) -> list[str]:
    """New parameters that no module of their own holds, so that they stay frozen; those of a base are constants.

    Args:
        whole: the modules that the adapter trains fully.
    """
    new = new_parameters(model)
    if new is None:
        of_head = model.base_model is not model and not _has_output_embeddings(model)
        new = frozenset(name for name, _ in model.named_parameters(recurse=False) if of_head)
    return sorted(name for name in new if not name.startswith(tuple(f"{path}." for path in whole)))


def named_modules(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The modules whose path is, or ends with, one of the names. Raises ConfigError for a name without a match."""
    found: list[str] = []
    paths = plain_paths(model)
    for name in names:
        matches = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not matches:
            endings = sorted({path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()})
            raise ConfigError(
                f"lora.modules_to_save: no module of this {model.config.model_type} is named {name!r}"
                f"{did_you_mean(name, endings)}; it has: {', '.join(endings)}"
            )
        for path in matches:
            _check_trainable(model, path)
        found += matches
    return found


def _check_trainable(model: PreTrainedModel, path: str) -> None:
    module = model.get_submodule(path)
    if module is input_embeddings(model) and (running := embeddings_that_run(model)):
        raise ConfigError(
            f"lora.modules_to_save: the model never calls {path}, so it cannot be trained; name {' or '.join(running)}"
        )
    packed = [each for each in module.modules() if isinstance(each, QuantisedLinear)]
    if packed or next(module.parameters(), None) is None:
        reason = f"has a weight packed in {packed[0].scheme}" if packed else "has no parameters"
        advice = "; leave model.quantised out, or do not name it" if packed else ""
        raise ConfigError(f"lora.modules_to_save: {path} {reason}, so it cannot be trained{advice}")


def outermost(model: PreTrainedModel, paths: Iterable[str]) -> list[str]:
    """The paths in the order of the model, without those that lie inside another one."""
    chosen = set(paths)
    within = {path for path in chosen if any(path.startswith(f"{other}.") for other in chosen)}
    return [path for path in plain_paths(model) if path in chosen - within]


def plain_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the plain model, without the wrappers of adapters."""
    module: Any = model.get_submodule(path)
    while inner := getattr(module, "original_module", None) or getattr(module, "base_layer", None):
        module = inner
    return module


def plain_paths(model: nn.Module) -> list[str]:
    """The paths of all modules as the plain model has them, in its order."""
    paths = dict.fromkeys(
        path.replace(".original_module", "").replace(".base_layer", "")
        for path, _ in modules_of_base(model, remove_duplicate=False)
        if path
    )
    return list(paths)


def _has_output_embeddings(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings() is not None


def _new_modules(model: PreTrainedModel, heads: Sequence[str]) -> list[str]:
    """The largest modules outside the head that have no parameter from the checkpoint."""
    new = {name for name in new_parameters(model) or () if not name.startswith(tuple(f"{path}." for path in heads))}
    loose = ", ".join(sorted(name for name in new if "." not in name))
    if loose and model.base_model is not model:
        raise ModelError(
            f"{model.name_or_path or type(model).__name__}: the checkpoint does not hold {loose}, and no module of the "
            "head does, so an adapter could neither train nor save it. Load the base without it (layer_weights: with "
            "use_weighted_layer_sum=False), or a checkpoint that holds it"
        )
    found, unfilled = sort_new(model, new)
    if unfilled:
        raise ModelError(
            f"{model.name_or_path or type(model).__name__}: the checkpoint does not hold {', '.join(unfilled[:3])}"
            f"{f' and {len(unfilled) - 3} more' if len(unfilled) > 3 else ''}, so transformers initialized them "
            "randomly. They would stay frozen and would not be saved; load a complete checkpoint"
        )
    return found


def sort_new(model: PreTrainedModel, new: set[str], strict: bool = False) -> tuple[list[str], list[str]]:
    """What parameters outside the head mean that no checkpoint has filled.

    Args:
        strict: whether embeddings and norms must be filled too. transformers draws new embeddings where a user resizes
            them, and where the decoder of an encoder-decoder is loaded alone.

    Returns:
        The largest modules that are new as a whole, so that an adapter can train and save them; and the parameters
        without which the base is no pretrained model: of a layer, with `strict` of an embedding or a norm, or random
        numbers that no module of their own holds.
    """
    found, unfilled = [], []
    for name in sorted(new):
        parents = name.split(".")[:-1]
        paths = [".".join(parents[:end]) for end in range(1, len(parents) + 1)]
        path = next((path for path in paths if _is_new(model, path, new)), None)
        if any(part.isdigit() for part in parents) or (strict and _is_embedding_or_norm(model, name)):
            unfilled.append(name)
        elif path is not None:
            found.append(path)
        elif not _is_constant(model.get_parameter(name)):
            unfilled.append(name)
    return found, unfilled


def _is_embedding_or_norm(model: PreTrainedModel, name: str) -> bool:
    if not name.startswith(base_prefix(model)):
        return False
    module = plain_module(model, name.rpartition(".")[0])
    return isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower() or "embed" in name


def _is_new(model: PreTrainedModel, path: str, new: set[str]) -> bool:
    module: Any = model.get_submodule(path)
    if module is model.base_model or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return all(f"{path}.{name}" in new for name, _ in module.named_parameters(remove_duplicate=False))


def _is_constant(parameter: nn.Parameter) -> bool:
    """Whether all its numbers are equal, as zeros and ones are, which every process initializes alike."""
    return bool((parameter == parameter.flatten()[0]).all())
