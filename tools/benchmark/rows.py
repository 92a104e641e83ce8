"""The training rows of a round, at their real lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from lora_hf.core.config.schema import RunConfig
from lora_hf.data.sampling import PromptSampler, number_prompts
from lora_hf.data.tasks.registry import get_task
from lora_hf.data.tokenization import encode
from lora_hf.models.load import load_tokenizer

MEGABATCH = 50  # batches that the Trainer's LengthGroupedSampler sorts together


def training_rows(config: RunConfig, steps: int) -> list[dict[str, Any]]:
    """The encoded rows of `steps` batches; with `group_by_prompt`, batches hold all rows of their prompts."""
    task = get_task(config.task.name)
    rows = task.load(config.task.data_dir, [task.train_split])[task.train_split]
    pool = max(MEGABATCH, steps) * config.train.batch_size
    tokenizer = load_tokenizer(config.model)
    if config.train.group_by_prompt:
        encoded = encode(task, rows, tokenizer, config.task.max_length)
        encoded = encoded.select(list(islice(PromptSampler(_prompts(encoded), config.train.seed), pool)))
    else:
        rows = rows.shuffle(seed=config.train.seed).select(range(min(len(rows), pool)))
        encoded = encode(task, rows, tokenizer, config.task.max_length)
        encoded = encoded.select(range(min(len(encoded), pool)))  # a row with several references becomes several rows
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if config.train.group_by_prompt:
        prompts = _prompts(encoded)
        longest = [0] * len(prompts)
        for prompt, length in zip(prompts, lengths, strict=True):
            longest[prompt] = max(longest[prompt], length)
        order = sorted(range(len(lengths)), key=lambda row: (-longest[prompts[row]], prompts[row]))
    else:
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return encoded.select(spread_batches(order, config.train.batch_size, steps)).to_list()


def spread_batches(order: Sequence[int], batch_size: int, steps: int) -> list[int]:
    """The rows of `steps` full batches, evenly spaced over rows sorted by length.

    Sides that group by length sort 50 batches at a time in a real epoch. Grouping only the few rows of a round would
    leave more padding than that. With evenly spaced batches they get the padding of a real epoch, and the lengths of
    the rows are representative.
    """
    full = len(order) // batch_size
    if full <= steps:
        return list(order[: steps * batch_size])
    chosen = [int((number + 0.5) * full / steps) for number in range(steps)]
    return [index for batch in chosen for index in order[batch * batch_size : (batch + 1) * batch_size]]


def count_tokens(rows: Sequence[dict[str, Any]]) -> int:
    """The number of real tokens, without padding."""
    return sum(sum(row["attention_mask"]) for row in rows)


def _prompts(encoded: Any) -> list[int]:
    return number_prompts(encoded["labels"], encoded["input_ids"])
