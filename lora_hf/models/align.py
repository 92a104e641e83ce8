"""Holds a base and its tokenizer against each other: padding, length, inputs, token ids and outputs."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.core.errors import DataError, ModelError
from lora_hf.data.tasks.base import Task
from lora_hf.lora.heads import task_type

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Their outputs depend on padding whatever the mask says: convolutions, Fourier transforms and landmarks run over it.
READS_PADDING = ("convbert", "fnet", "nystromformer", "yoso")

# The names that transformers gives to embeddings of absolute positions: position_embeddings, embed_positions, wpe.
_POSITIONS = re.compile(r"(^|_)(pos|positions?)(_|$)|^wpe$")


def align_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Makes the two agree, in place, before either is used.

    The config gets the tokenizer's padding token. The tokenizer's `model_max_length` is at most the number of the
    base's positions, and it returns only inputs that the base reads, the attention mask among them.

    Raises:
        ModelError: the base cannot be padded with the padding token, or no text fits into `model_max_length`.
    """
    name, config = model.name_or_path, model.config.get_text_config()
    pad, vocabulary = tokenizer.pad_token_id, getattr(config, "vocab_size", None)
    if not isinstance(pad, int) or (vocabulary and pad >= vocabulary):
        raise ModelError(
            f"{name}: the tokenizer's padding token {tokenizer.pad_token!r} has id {pad}, but the base has embeddings "
            f"for ids below {vocabulary} only. Set pad_token in tokenizer_config.json to a token that the base has, or "
            "name another tokenizer with model.tokenizer"
        )
    if reads_end_token(model) and pad == model.config.eos_token_id:
        raise ModelError(
            f"{name}: the tokenizer pads with the end token {tokenizer.pad_token!r} (id {pad}), where "
            f"{type(model).__name__} reads its answer. Set pad_token in tokenizer_config.json to another token"
        )
    if not _counts_from_padding(model):
        model.config.pad_token_id = config.pad_token_id = pad
    elif pad not in (config.pad_token_id, tokenizer.eos_token_id):  # the end token stands in where there is no other
        raise ModelError(
            f"{name}: the tokenizer pads with {tokenizer.pad_token!r} (id {pad}), but config.json has the pad_token_id "
            f"{config.pad_token_id}, from which {model.config.model_type} counts positions; expected the id with which "
            "the base was trained in both"
        )
    _warn_of_another_end(tokenizer, model)
    if model.config.model_type in READS_PADDING:
        logger.warning(
            "%s: %s computes on padding too, so in training a row's loss and scores depend on the rows beside it, "
            "unless train.batch_size and train.eval_batch_size are 1; predict, eval and serve batch rows of one length",
            name, model.config.model_type,
        )  # fmt: skip
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, (int, float)):
        raise ModelError(
            f"{name}: the tokenizer has the model_max_length {tokenizer.model_max_length!r}; expected a number. Set it "
            "in tokenizer_config.json to the number of tokens that the base reads"
        )
    limit = position_limit(model)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    special = tokenizer.num_special_tokens_to_add()
    if tokenizer.model_max_length <= special:
        raise ModelError(
            f"{name}: expected space for {special} special tokens and a text, found a model_max_length of "
            f"{tokenizer.model_max_length}; set it in tokenizer_config.json to the number of tokens that the base reads"
        )
    unread = [each for each in tokenizer.model_input_names if not _reads(model, each)]
    if unread:
        tokenizer.model_input_names = [each for each in tokenizer.model_input_names if each not in unread]
    if "attention_mask" not in tokenizer.model_input_names and _reads(model, "attention_mask"):
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]


def _warn_of_another_end(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """The end token is where a tokenizer of another model shows, even if all its ids have embeddings."""
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    if tokenizer.eos_token_id is not None and end is not None and tokenizer.eos_token_id not in ends:
        logger.warning(
            "%s: the tokenizer's end token %r has id %s, but that in config.json is %s; if this is the tokenizer of "
            "another model, name the base's own with model.tokenizer",
            model.name_or_path or model.config.model_type, tokenizer.eos_token, tokenizer.eos_token_id, end,
        )  # fmt: skip


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that the base has positions for; None for rotary, relative and other unlimited ones."""
    limits = []
    for path, module in model.base_model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.search(path.rpartition(".")[2]):
            padding = -1 if module.padding_idx is None else module.padding_idx  # RoBERTa counts from the id after it
            limits.append(module.num_embeddings - int(getattr(module, "offset", padding + 1)))
        elif isinstance(table := getattr(module, "embed_positions", None), nn.Buffer):  # GPT-J's table of angles
            limits.append(len(table))
    return min(limits, default=None)


def padding_side(model: PreTrainedModel) -> Literal["left", "right"]:
    """Where batches are padded for everything but generation, whatever side the tokenizer was saved with.

    Padding in front would move a row's absolute positions with the length of its batch. XLNet's positions are relative,
    and its classifier reads the last position, padding or not. Where each token has an output, padding is always
    behind: outputs of several batches are padded there.
    """
    has_token_outputs = task_type(model) in ("TOKEN_CLS", "QUESTION_ANS")
    return "left" if model.config.model_type == "xlnet" and not has_token_outputs else "right"


def reads_end_token(model: PreTrainedModel) -> bool:
    """Whether this is the classifier of an encoder-decoder, whose answer is at the end token."""
    return model.config.is_encoder_decoder and hasattr(model, "classification_head")


def split_by_length(model: PreTrainedModel, rows: Sequence[T], lengths: Sequence[int]) -> list[list[T]]:
    """Splits a batch into batches without padding, where padding would change the outputs; else returns it whole.

    Args:
        lengths: the number of tokens of each row.
    """
    if model.config.model_type not in READS_PADDING:
        return [list(rows)]
    return [[row for row, each in zip(rows, lengths, strict=True) if each == length] for length in sorted({*lengths})]


def output_logits(output: Any) -> torch.Tensor:
    """The logits of a batch; those of the starts and ends of answers as `(batch, seq, 2)`."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


def check_tokens(
    task: Task,
    ids: pa.ChunkedArray | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> None:
    """Checks encoded rows: the base can read every token, and an encoder-decoder's classifier finds its end tokens.

    Rows that are mostly unknown to the tokenizer get a warning.

    Raises:
        DataError: the first row that the model cannot read.
    """
    if not len(ids):
        return
    if isinstance(ids, Sequence):
        values = np.array([token for row in ids for token in row], dtype=np.int64)
        parents = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    else:
        rows: Any = ids.combine_chunks()
        values, parents = rows.flatten().to_numpy(), rows.value_parent_indices().to_numpy()
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if vocabulary and len(values) and values.max() >= vocabulary:
        first = int((values >= vocabulary).argmax())
        token = tokenizer.convert_ids_to_tokens(int(values[first]))
        raise DataError(
            f"{task.name}: row {parents[first]} (counting from 0) has the token {token!r} with id {values[first]}, but "
            f"{model.name_or_path} has embeddings for ids below {vocabulary} only. Remove it from the text, name the "
            "base's own tokenizer with model.tokenizer, or resize the base's embeddings"
        )
    _warn_of_unknown_words(task, values, parents, tokenizer)
    if reads_end_token(model):
        end = model.config.eos_token_id
        encode: Any = tokenizer
        usual = encode(*["a"] * len(task.text_columns))
        expected, ends = usual["input_ids"].count(end), np.bincount(parents[values == end], minlength=len(ids))
        other = (ends != expected) | (ends == 0)
        if other.any():
            row = int(other.argmax())
            raise DataError(
                f"{task.name}: row {row} (counting from 0) has {ends[row]} tokens with the id {end}, where "
                f"{type(model).__name__} reads its answer; expected {max(expected, 1)}, which the base's own tokenizer "
                f"adds. Remove {tokenizer.convert_ids_to_tokens(end)!r} from the text, or set model.tokenizer"
            )


def _warn_of_unknown_words(
    task: Task, tokens: np.ndarray, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Names the rows whose text, special tokens aside, is mostly the token for unknown words.

    Args:
        tokens, rows: the tokens of all rows `(tokens,)`, and the row of each.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or not (tokens == unknown).any():
        return
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return
    special = [token for token in tokenizer.all_special_ids if token != unknown]
    count = int(rows.max(initial=-1)) + 1
    of_text = np.bincount(rows[~np.isin(tokens, special)], minlength=count)
    affected = np.flatnonzero(2 * np.bincount(rows[tokens == unknown], minlength=count) > of_text)
    if len(affected):
        logger.warning(
            "%s: of %d rows, more than half of the text is unknown to the tokenizer (%s), so the model cannot read it; "
            "the first is row %d (counting from 0). Choose a base for this language or script",
            task.name, len(affected), tokenizer.unk_token, affected[0],
        )  # fmt: skip


def _counts_from_padding(model: PreTrainedModel) -> bool:
    """Whether positions start after the padding token's id, as in RoBERTa, so that the config must keep this id."""
    return any(
        isinstance(module, nn.Embedding)
        and module.padding_idx is not None
        and _POSITIONS.search(path.rpartition(".")[2])
        for path, module in model.base_model.named_modules()
    )


def _reads(model: PreTrainedModel, name: str) -> bool:
    if name == "token_type_ids" and getattr(model.config, "type_vocab_size", None) == 1:
        return False  # a second segment would have no embedding
    return name in inspect.signature(type(model).forward).parameters
