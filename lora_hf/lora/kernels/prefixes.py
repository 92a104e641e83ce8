"""The prefixes that rows of a causal model's batch have in common, and the trees of rows that share them.

In a causal model a token's hidden state depends on the tokens before it alone. Rows that begin with the same tokens,
such as the references of one input, need that prefix only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAIRS = 1.5  # a token costs as much as `PAIRS * hidden` attention pairs: 6 by operations, fewer by measured time


@dataclass(frozen=True)
class Trees:
    """The rows of a batch with each shared prefix kept once.

    Tokens of rows are numbered row after row, those of trees tree after tree.

    Attributes:
        lengths: the number of tokens of each tree.
        first: for each token of the trees the number of the first token of a row that it stands for.
        copies: for each token of the rows the number of its token in a tree.
        sees: for each tree `(length, length)`, True if a token sees another; None for a tree of one row.
    """

    lengths: list[int]
    first: Tensor
    copies: Tensor
    sees: list[Tensor | None]


def share_prefixes(rows: Sequence[list[int]], hidden: int) -> Trees | None:
    """The trees of rows of token ids, for a model of this hidden size; None if no sharing is worth it.

    A row joins a tree if the projections of the tokens that it shares cost more than attention in a longer sequence.
    """
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    first: list[int] = []
    copies = [0] * starts[-1]
    trees: list[list[tuple[list[int], int]]] = []  # for each row its positions in the tree, and how many it shares
    size, previous = 0, list[int]()
    # Sorted by tokens, each row comes next to the one that it shares most with.
    for index in sorted(range(len(rows)), key=lambda number: rows[number]):
        row = rows[index]
        common = _common(previous, row)
        new = len(row) - common
        if trees and common * PAIRS * hidden > (size + new) ** 2 - size**2 - len(row) ** 2:
            path = trees[-1][-1][0][:common]
        else:
            path, common, new, size = [], 0, len(row), 0
            trees.append([])
        base = len(first) - size
        path = path + list(range(size, size + new))
        first += range(starts[index] + common, starts[index + 1])
        copies[starts[index] : starts[index + 1]] = [base + position for position in path]
        trees[-1].append((path, common))
        size, previous = size + new, row
    if len(trees) == len(rows):
        return None
    lengths = [max(path[-1] for path, _ in tree) + 1 for tree in trees]
    sees = [_visible(tree, length) if len(tree) > 1 else None for tree, length in zip(trees, lengths, strict=True)]
    return Trees(lengths, torch.tensor(first), torch.tensor(copies), sees)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (left, right) in pairs if left != right), min(len(one), len(other)))


def _visible(tree: list[tuple[list[int], int]], length: int) -> Tensor:
    sees = torch.zeros(length, length, dtype=torch.bool)
    for path, common in tree:
        positions = torch.tensor(path)
        causal = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        sees[positions[common:, None], positions] = causal[common:]
    return sees
