"""Which tokens of a causal model's batch are the same computation, and the trees of rows that share them.

In a causal model a token's hidden state depends on the tokens before it alone. Rows that begin alike, such as the
references of one input, need that beginning only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

PAIRS = 1.5  # a token costs as much as `PAIRS * hidden` pairs of attended tokens: 6 by operations, fewer by the clock


@dataclass(frozen=True)
class Trees:
    """The rows of a batch with each shared beginning kept once.

    Tokens of rows are numbered row after row, those of trees tree after tree. `first` has for each token of the trees
    the number of the first such token of a row, `copies` for each token of the rows the number of its token in a tree.
    `sees[i]` is `(length, length)`, True where a tree's token sees another; None for a tree of one row.
    """

    lengths: list[int]
    first: torch.Tensor
    copies: torch.Tensor
    sees: list[torch.Tensor | None]


def share_prefixes(rows: Sequence[list[int]], hidden: int) -> Trees | None:
    """The trees of rows of token ids, for a model of this hidden size; None where no row shares enough to pay.

    A row joins a tree where the projections of the tokens it shares cost more than the attention of a longer sequence.
    """
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    first: list[int] = []
    copies = [0] * starts[-1]
    trees: list[list[tuple[list[int], int]]] = []  # the path of each row among its tree's tokens; how much is shared
    size, previous = 0, list[int]()
    # In order of their tokens, the row that shares most with a row stands beside it.
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
        copies[starts[index] : starts[index + 1]] = [base + place for place in path]
        trees[-1].append((path, common))
        size, previous = size + new, row
    if len(trees) == len(rows):
        return None
    lengths = [max(path[-1] for path, _ in tree) + 1 for tree in trees]
    sees = [_sight(tree, length) if len(tree) > 1 else None for tree, length in zip(trees, lengths, strict=True)]
    return Trees(lengths, torch.tensor(first), torch.tensor(copies), sees)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def _sight(tree: list[tuple[list[int], int]], length: int) -> torch.Tensor:
    sees = torch.zeros(length, length, dtype=torch.bool)
    for path, common in tree:
        places = torch.tensor(path)
        sees[places[common:, None], places] = torch.ones(len(path), len(path), dtype=torch.bool).tril()[common:]
    return sees
