"""Rows that are longer than a model reads, as overlapping windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lora_hf.core.errors import DataError, ModelError
from lora_hf.data.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = "window"  # the column of encoded rows with the number of a window in its row


@dataclass(frozen=True, kw_only=True)
class WindowedTask(Task):
    """A task that reads the whole of a long row; `stride` is how many tokens its windows share."""

    stride: int | None = None

    def truncated_part(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return "nothing, as windows cover them"

    def check_offsets(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises a ModelError for a tokenizer that cannot say where in a text its tokens are."""
        if not tokenizer.is_fast:
            raise ModelError(
                f"{self.name}: the tokenizer {tokenizer.name_or_path!r} is a slow one, which does not say where in the "
                "text its tokens are; choose a model with a fast tokenizer (tokenizer.json)"
            )

    def fit_stride(self, max_length: int, capacity: int, what: str, least: int = 1) -> int:
        """Returns the stride, by default a third of `max_length`; windows share at most half of their capacity.

        Args:
            capacity: the tokens that `what` leaves in a window for the text.

        Raises:
            DataError: these are less than `least`.
        """
        if capacity < least:
            raise DataError(
                f"{self.name}: {what} leave {max(capacity, 0)} of {max_length} tokens for the text (task.max_length, "
                f"or the model's own limit); expected at least {least}; set a greater task.max_length, or shorten the "
                "row"
            )
        return min(max_length // 3 if self.stride is None else self.stride, capacity // 2)


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
