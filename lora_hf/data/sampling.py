"""Which rows come together in a batch, in which order, and which of them belong to which process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_hf.core.labels import IGNORE_INDEX


class EpochSampler(torch.utils.data.Sampler):
    """Another sampler of rows, with an order for each epoch that depends on the seed alone.

    The Trainer draws the order of `group_by_length` from the generator of everything else: a run that goes on in the
    middle of an epoch would get another.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


class PromptSampler(torch.utils.data.Sampler):
    """Rows in random order, those of one prompt together and among themselves in random order too.

    In a batch of such rows a causal model computes the prompt once (`kernels/prefixes.py`).
    """

    def __init__(self, prompts: list[int], seed: int) -> None:
        self.prompts = torch.tensor(prompts)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.prompts), generator=generator)
        places = torch.randperm(int(self.prompts.max()) + 1, generator=generator)[self.prompts[rows]]
        return iter(rows[places.argsort(stable=True)].tolist())


def number_prompts(labels: Iterable[Sequence[int]], input_ids: Iterable[Sequence[int]]) -> list[int]:
    """For each row the number of its prompt: the tokens in front of its first label."""
    numbers: dict[tuple[int, ...], int] = {}
    found = []
    for row, ids in zip(labels, input_ids, strict=True):
        length = next((place for place, label in enumerate(row) if label != IGNORE_INDEX), len(row))
        found.append(numbers.setdefault(tuple(ids[:length]), len(numbers)))
    return found


def last_batch_share(rows: int, batch_size: int, processes: int, place: int) -> tuple[int, float]:
    """Of the last batch of an epoch: how many of a process's rows are not there twice, and what its mean loss counts.

    All processes get batches of one size, and where the rows do not suffice they begin again at the first ones. The
    mean over processes of their mean losses, each times what it counts, is the mean over the rows.

    Args:
        rows: of the training set.
        batch_size: of each process.
        place: the number of the process; the rows are dealt out in order.
    """
    last = rows % (batch_size * processes) or batch_size * processes
    own = min(max(last - place * batch_size, 0), batch_size)
    return own, own * processes / last
