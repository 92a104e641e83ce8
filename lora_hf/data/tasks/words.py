"""The words of a text, and the spans that tags of words mark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

# Scripts without spaces between words: Han, kana, and their extensions.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
# A run of characters from a letter or digit to the last one before a space, such as U.S or 3.14; each other character.
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}](?:[^\s{_ALONE}]*[^\W{_ALONE}])?|[^\w\s]")

OUTSIDE = "O"


@dataclass(frozen=True)
class Words:
    """A text and the offsets of its words."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[str]:
        return (self.text[start:end] for start, end in zip(self.starts, self.ends, strict=True))


def split_words(text: str) -> Words:
    """Returns the words of a text, with punctuation at their edges as words of its own."""
    found = [match.span() for match in _WORD.finditer(text)]
    return Words(text, [start for start, _ in found], [end for _, end in found])


def join_words(words: Sequence[str]) -> Words:
    """Returns the text of words with a space between them."""
    starts = list(accumulate((len(word) + 1 for word in words), initial=0))[:-1]
    return Words(" ".join(words), starts, [start + len(word) for start, word in zip(starts, words, strict=True)])


def repair_bio(tags: Sequence[str]) -> list[str]:
    """Returns the tags with B- for every I- that continues no span of its type."""
    repaired: list[str] = []
    for tag in tags:
        prefix, _, kind = tag.partition("-")
        continues = repaired and repaired[-1] in (f"B-{kind}", f"I-{kind}")
        repaired.append(f"B-{kind}" if prefix == "I" and not continues else tag)
    return repaired


def tag_spans(words: Words, spans: Sequence[tuple[int, int, str]]) -> tuple[list[str], list[str]]:
    """Returns the BIO tag of each word, and what could not be tagged exactly.

    A word belongs to the first span that covers a part of it.

    Args:
        spans: start, end and type of each, in order of their starts.
    """
    tags, problems = [OUTSIDE] * len(words), []
    for start, end, kind in spans:
        covered = [index for index in range(len(words)) if words.starts[index] < end and words.ends[index] > start]
        free = [index for index in covered if tags[index] == OUTSIDE]
        for position, index in enumerate(free):
            tags[index] = f"{'I' if position else 'B'}-{kind}"
        shown = f"{words.text[start:end]!r:.60}"
        if not free:
            problems.append(f"{shown} has no word of its own")
        elif (words.starts[free[0]], words.ends[free[-1]]) != (start, end):
            problems.append(f"{shown} became {words.text[words.starts[free[0]] : words.ends[free[-1]]]!r:.60}")
    return tags, problems
