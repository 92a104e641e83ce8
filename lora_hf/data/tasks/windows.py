"""Rows that are longer than a model reads, as overlapping windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lora_hf.core.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = "window"  # the column of encoded rows with the number of a window in its row


def check_offsets(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Raises a ModelError for a tokenizer that cannot say where in a text its tokens are."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{task}: the tokenizer {tokenizer.name_or_path!r} is a slow one, which does not say where in the text "
            "its tokens are; choose a model with a fast tokenizer (tokenizer.json)"
        )


def fit_stride(stride: int | None, max_length: int, capacity: int) -> int:
    """Returns how many tokens two windows share.

    Args:
        stride: what the config asks for; by default a third of `max_length`.
        capacity: the tokens of the text in one window; windows share at most half of them.
    """
    return min(max_length // 3 if stride is None else stride, capacity // 2)


def check_capacity(capacity: int, task: str, what: str, max_length: int, least: int = 1) -> None:
    """Raises a DataError if `what` leaves less than `least` tokens of a window for the text."""
    if capacity < least:
        raise DataError(
            f"{task}: {what} leave {max(capacity, 0)} of {max_length} tokens for the text (task.max_length, or the "
            f"model's own limit); expected at least {least}; set a greater task.max_length, or shorten the row"
        )


def window_numbers(owners: Sequence[int]) -> list[int]:
    """Returns the number of each window in its row, from the rows of all windows in order."""
    numbers: list[int] = []
    for index, owner in enumerate(owners):
        numbers.append(numbers[-1] + 1 if index and owners[index - 1] == owner else 0)
    return numbers


def windows_of_rows(numbers: Sequence[int]) -> list[range]:
    """Returns the indices of each row's windows, from the numbers of all windows in their rows."""
    starts = [index for index, number in enumerate(numbers) if number == 0]
    return [range(start, end) for start, end in pairwise([*starts, len(numbers)])]
