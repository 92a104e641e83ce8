"""Which rows of a file train and which validate: drawn from a seed of their own, so that runs with different
`train.seed` share them."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError
from lora_hf.data.tasks.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRows:
    """A source with at most `count` rows of its training split; the other splits stay whole."""

    source: Source
    count: int
    seed: int
    train_split: str = "train"

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        rows, origin = self.source.read(split, data_dir)
        return (limit_rows(rows, self.count, self.seed) if split == self.train_split else rows), origin


def limit_rows(rows: Dataset, count: int, seed: int) -> Dataset:
    """Returns `count` of the rows in their order, each class with its share; all rows if there are no more."""
    if count > len(rows):
        logger.warning("task.train_rows=%d: there are only %d training rows", count, len(rows))
    if count >= len(rows):
        return rows
    return rows.select(_draw(classes_of(rows), count, seed))


def split_rows(rows: Dataset, share: float, seed: int, inputs: Sequence[Any], origin: str) -> tuple[Dataset, Dataset]:
    """Returns training and validation rows in their order; each class has the same share of its rows in both.

    Rows with the same input, of which `inputs` has one for each row, stay on one side.

    Raises:
        DataError: not both sides get a row.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, values in enumerate(inputs):
        groups[repr(values)].append(index)
    members, classes = list(groups.values()), classes_of(rows)
    count = round(share * len(members))
    if not 0 < count < len(members):
        raise DataError(
            f"{origin}: task.validation={share:g} of {len(members)} different inputs leaves {len(members) - count} to "
            f"train and {count} to validate on; expected at least one of each"
        )
    held_out = _draw([classes[indices[0]] for indices in members], count, seed)
    validation = sorted(index for group in held_out for index in members[group])
    chosen = set(validation)
    return rows.select([index for index in range(len(rows)) if index not in chosen]), rows.select(validation)


def classes_of(rows: Dataset) -> list[Any]:
    """Returns what is drawn from in shares: the class of each row, of several labels the rarest; else one for all."""
    from datasets import ClassLabel

    feature = rows.features.get("label")
    if isinstance(feature, ClassLabel) or str(getattr(feature, "dtype", "")).startswith("int"):
        return rows["label"][:]
    if getattr(getattr(feature, "feature", None), "dtype", None) != "int8":
        return [None] * len(rows)
    labels = rows["label"][:]
    counts = [sum(column) for column in zip(*labels, strict=True)]
    return [min((index for index, on in enumerate(row) if on), key=lambda i: counts[i], default=-1) for row in labels]


def _draw(classes: Sequence[Any], count: int, seed: int) -> list[int]:
    """Returns `count` indices in their order: of each class its share, by the largest remainders."""
    members: dict[Any, list[int]] = defaultdict(list)
    for index, name in enumerate(classes):
        members[name].append(index)
    shares = {name: count * len(indices) / len(classes) for name, indices in members.items()}
    by_remainder = sorted(members, key=lambda name: (int(shares[name]) - shares[name], members[name][0]))
    extra = set(by_remainder[: count - sum(map(int, shares.values()))])
    generator = random.Random(seed)
    drawn = []
    for name, indices in members.items():
        drawn += generator.sample(indices, int(shares[name]) + (name in extra))
    return sorted(drawn)
