"""The order of training rows, and how the last batch of an epoch is shared between processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_hf.core.labels import IGNORE_INDEX


class _SeededSampler(torch.utils.data.Sampler):
    """A sampler whose order depends on the seed and the epoch alone, so that a resumed epoch keeps its order."""

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + self.epoch)


class EpochSampler(_SeededSampler):
    """Wraps the sampler of `group_by_length`, for which the Trainer draws from the global generator."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        super().__init__(seed)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = self._generator()
        return iter(self.sampler)


class PromptSampler(_SeededSampler):
    """Random order of prompts, with all rows of a prompt one after the other in random order.

    In a batch of such rows a causal model computes the prompt once (`lora.kernels.prefixes`).
    """

    def __init__(self, prompts: list[int], seed: int) -> None:
        super().__init__(seed)
        self.prompts = torch.tensor(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[int]:
        generator = self._generator()
        rows = torch.randperm(len(self.prompts), generator=generator)
        positions = torch.randperm(int(self.prompts.max()) + 1, generator=generator)[self.prompts[rows]]
        return iter(rows[positions.argsort(stable=True)].tolist())


def number_prompts(labels: Iterable[Sequence[int]], input_ids: Iterable[Sequence[int]]) -> list[int]:
    """Returns the number of each row's prompt: equal for rows whose tokens before the first label are equal."""
    numbers: dict[tuple[int, ...], int] = {}
    prompts = []
    for row_labels, ids in zip(labels, input_ids, strict=True):
        length = next((index for index, label in enumerate(row_labels) if label != IGNORE_INDEX), len(row_labels))
        prompts.append(numbers.setdefault(tuple(ids[:length]), len(numbers)))
    return prompts


def last_batch_share(rows: int, batch_size: int, world_size: int, rank: int) -> tuple[int, float]:
    """Returns how many rows of a process's last batch are its own, and the weight of its mean loss.

    All processes get batches of the same size; missing rows are filled up with the first rows of the training set. The
    mean over the processes of weight times mean loss is the mean over the rows.

    Args:
        rows: of the training set, dealt out in order of rank.
        batch_size: per process.
    """
    last = rows % (batch_size * world_size) or batch_size * world_size
    own = min(max(last - rank * batch_size, 0), batch_size)
    return own, own * world_size / last
