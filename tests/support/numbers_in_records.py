"""Whether every number of a page stands in a record: `unexplained(text, records)` lists those that do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
# Names such as gpt2, F1 or tiny-roberta, and what a page quotes or points to.
NAMES = re.compile(r"(?<![\w.])[A-Za-z_](?:[\w-]|\\_)*")
NOT_SAID = (
    re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^>.*$", re.MULTILINE),  # a quoted row of data
    re.compile(r"(?<=\])\([^)]*\)"),  # where a link or a picture leads
    re.compile(r"arXiv[: ]\d{4}\.\d{5}"),
)

# How a page may write a number of a record.
RENDERINGS: tuple[Callable[[float], str], ...] = (
    *(lambda value, digits=digits: f"{value:.{digits}f}" for digits in (1, 2, 3, 4)),
    *(lambda value, form=form: form.format(value) for form in ("{:g}", "{:.2g}")),
    *(lambda value, digits=digits: f"{100 * value:.{digits}f}" for digits in (0, 1, 2)),  # percent
    *(lambda value, digits=digits: f"{value / 1e6:,.{digits}f}" for digits in (0, 1, 2)),  # MB, millions
    lambda value: f"{value / 60:.1f}",  # minutes
    lambda value: f"{value:,.0f}",
)


def unexplained(
    text: str, records: Sequence[Any], renderings: Sequence[Callable[[float], str]] = RENDERINGS
) -> list[str]:
    """The numbers of a Markdown text that no record has, in their order.

    A number is explained where one of `renderings` makes it from a number of the records, sign aside, or where it
    stands in one of their texts or keys. Code fences, quotes, targets of links and names with digits are not looked at.

    Args:
        records: what `json.load` gives.
    """
    known: set[str] = set()
    for leaf in _leaves(list(records)):
        if isinstance(leaf, str):
            known.update(NUMBER.findall(leaf))
        else:
            known.add(f"{leaf:,}")
            known.update(render(abs(leaf)) for render in renderings)
    for pattern in (*NOT_SAID, NAMES):
        text = pattern.sub(" ", text)
    return [number for number in NUMBER.findall(text) if number not in known]


def _leaves(value: Any) -> Iterator[str | float]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value
