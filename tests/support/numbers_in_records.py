"""Finds the numbers of a page that come from no record."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
NAMES = re.compile(r"(?<![\w.])[A-Za-z_](?:[\w-]|\\_)*")  # such as gpt2, F1, tiny-roberta
NOT_PROSE = (
    re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^>.*$", re.MULTILINE),  # a quoted row of data
    re.compile(r"(?<=\])\([^)]*\)"),  # the target of a link or an image
    re.compile(r"arXiv[: ]\d{4}\.\d{5}"),
)

# The ways in which a page may write a number of a record.
RENDERINGS: tuple[Callable[[float], str], ...] = (
    *(lambda value, digits=digits: f"{value:.{digits}f}" for digits in (1, 2, 3, 4)),
    *(lambda value, form=form: form.format(value) for form in ("{:g}", "{:.2g}", "{:.0e}", "{:.1e}")),
    *(lambda value, digits=digits: f"{100 * value:.{digits}f}" for digits in (0, 1, 2)),  # percent
    *(lambda value, digits=digits: f"{value / 1e6:,.{digits}f}" for digits in (0, 1, 2)),  # MB, millions
    lambda value: f"{value / 60:.1f}",  # minutes
    lambda value: f"{value:,.0f}",
)


def unexplained(text: str, records: Sequence[Any]) -> list[str]:
    """The numbers in the Markdown `text` that no record explains, in order.

    A record, as `json.load` returns it, explains a number that one of `RENDERINGS` makes from its numbers (the sign is
    ignored), or that appears in its keys or strings. Code blocks, quotes, link targets and names are skipped.
    """
    known: set[str] = set()
    for leaf in _leaves(list(records)):
        if isinstance(leaf, str):
            known.update(NUMBER.findall(leaf))
        else:
            known.add(f"{leaf:,}")
            known.update(render(abs(leaf)) for render in RENDERINGS)
    for pattern in (*NOT_PROSE, NAMES):
        text = pattern.sub(" ", text)
    return [number for number in NUMBER.findall(text) if number not in known]


def _leaves(value: Any) -> Iterator[str | float]:
    """Every key, string and number, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value
