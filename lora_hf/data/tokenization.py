"""A task's rows as model inputs, tokenised once and kept in the cache of `datasets`."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, config
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from transformers import PreTrainedTokenizerBase

from lora_hf.data.tasks.base import Task

logger = logging.getLogger(__name__)

KEPT_FROM = 2000  # rows; fewer are tokenised again in less time than it takes to look for them


def encode(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The rows of a split as model inputs, unpadded, nothing else kept.

    The tokens of many rows are kept under `$HF_DATASETS_CACHE/lora_hf`, which may be deleted at any time. They are
    found again by all that they depend on: the rows themselves, the tokenizer, the length, the code of the tasks.
    """
    limit = min(max_length, tokenizer.model_max_length)
    options: dict[str, Any] = {"batched": True, "remove_columns": rows.column_names}

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        return task.encode(batch, tokenizer, limit)

    backend = getattr(tokenizer, "backend_tokenizer", None)
    disable_progress_bar()
    try:
        if len(rows) < KEPT_FROM or backend is None:
            return rows.map(tokens, **options)
        key = _key(task, rows, tokenizer, backend.to_str(), limit)
        file = Path(config.HF_DATASETS_CACHE) / "lora_hf" / f"{task.name}-{key[:32]}.arrow"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return rows.map(tokens, **options, cache_file_name=str(file), new_fingerprint=key[:16])
        except pa.ArrowInvalid:
            logger.warning("%s is damaged: tokenising anew", file)
            file.unlink()
            return rows.map(tokens, **options, cache_file_name=str(file), new_fingerprint=key[:16])
        except OSError as error:
            logger.warning("tokens are not kept: %s: %s", file.parent, error.strerror)
            return rows.map(tokens, **options)
    finally:
        enable_progress_bar()


def _key(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, backend: str, limit: int) -> str:
    table: Any = rows.with_format("arrow")[:]
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema.remove_metadata()) as stream:
        stream.write_table(table.replace_schema_metadata().combine_chunks())
    found = hashlib.sha256(buffer.getvalue())
    # What earlier calls asked of the tokenizer stays in its state, and is asked anew in each.
    state = json.loads(backend) | {"truncation": None, "padding": None}
    words = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.padding_side, limit, repr(task), state]
    found.update(json.dumps(words, sort_keys=True, default=str).encode())
    for source in sorted((Path(__file__).parent / "tasks").glob("*.py")):
        found.update(source.read_bytes())
    return found.hexdigest()
