"""A task's rows as model inputs, tokenized once and cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, config
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from transformers import PreTrainedTokenizerBase

from lora_hf.data.tasks.base import TRUNCATED, Task

logger = logging.getLogger(__name__)

MIN_CACHED_ROWS = 2000  # tokenizing fewer takes less time than computing their key


def encode(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str = "") -> Dataset:
    """Returns the rows of a split as unpadded model inputs, without other columns; warns about truncated rows.

    Many rows are cached under `$HF_DATASETS_CACHE/lora_hf`, which may be deleted at any time. Their key depends on
    everything that the tokens do: the rows, the tokenizer, the length, and the code of the tasks.
    """
    limit = min(max_length, tokenizer.model_max_length)
    task.warn_honored_tokens(rows, tokenizer, split)
    encoded = task.select_encoded(_encode(task, rows, tokenizer, limit), rows, tokenizer, limit, split)
    task.warn_truncated(encoded[TRUNCATED][:], tokenizer, limit, split)
    return encoded.remove_columns(TRUNCATED)


def digest_of(encoded: Dataset) -> str:
    """Returns a hash of what the model reads of the rows of a split, labels included, in their order."""
    digest = hashlib.sha256()
    table: Any = encoded.with_format("arrow")[:]
    for name in sorted(table.column_names):
        digest.update(name.encode())
        _add(digest, table.column(name).combine_chunks())
    return digest.hexdigest()


def _add(digest: Any, values: Any) -> None:
    if pa.types.is_list(values.type):
        digest.update(values.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        _add(digest, values.flatten())
    elif pa.types.is_primitive(values.type):
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(repr(values.to_pylist()).encode())


def _encode(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
    encode_batch = partial(task.encode, tokenizer=tokenizer, max_length=limit)
    encode_rows = partial(rows.map, encode_batch, batched=True, remove_columns=rows.column_names)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    disable_progress_bar()
    try:
        if len(rows) < MIN_CACHED_ROWS or backend is None:
            return encode_rows()
        key = _key(task, rows, tokenizer, backend.to_str(), limit)
        file = Path(config.HF_DATASETS_CACHE) / "lora_hf" / f"{task.name}-{key[:32]}.arrow"
        cache: dict[str, Any] = {"cache_file_name": str(file), "new_fingerprint": key[:16]}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return encode_rows(**cache)
        except pa.ArrowInvalid:
            logger.warning("%s is damaged: tokenizing the rows again", file)
            file.unlink()
            return encode_rows(**cache)
        except OSError as error:
            logger.warning("the tokens are not cached: %s: %s", file.parent, error.strerror)
            return encode_rows()
    finally:
        enable_progress_bar()


def _key(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, backend: str, limit: int) -> str:
    table: Any = rows.with_format("arrow")[:]
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema.remove_metadata()) as stream:
        stream.write_table(table.replace_schema_metadata().combine_chunks())
    key = hashlib.sha256(buffer.getvalue())
    # Every call sets truncation and padding anew, so the state that earlier calls left behind does not matter.
    state = json.loads(backend) | {"truncation": None, "padding": None}
    names = tokenizer.model_input_names
    values = [type(tokenizer).__name__, tokenizer.special_tokens_map, names, limit, repr(task), state]
    # What the tokenizer holds beside its backend, which has its source language.
    values += [tokenizer.chat_template, tokenizer.truncation_side, getattr(tokenizer, "tgt_lang", None)]
    key.update(json.dumps(values, sort_keys=True, default=str).encode())
    for source in sorted((Path(__file__).parent / "tasks").glob("*.py")):
        key.update(source.read_bytes())
    return key.hexdigest()
