"""Reads the documentation: code blocks, headings, anchors and links of a Markdown page.

Two comments that readers do not see control the blocks:

- `<!-- not run: needs the hub -->` before a block: the test suite skips it, for this reason.
- `<!-- before: bash`, commands, `-->`: a hidden block that prepares what a reader has by then, such as an adapter.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPO = Path(__file__).parents[2]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])
RUN = ("bash", "python")  # the languages whose blocks run
NOT_RUN = re.compile(r"\s*<!-- not run: (?P<reason>.+?) -->\s*", re.DOTALL)
BEFORE = re.compile(r"\s*<!-- before: (?P<language>bash|python)\n(?P<text>.*?)-->\s*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block. `not_run` is the reason that its page gives for skipping it."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None = None
    hidden: bool = False

    def __str__(self) -> str:
        return f"{page_name(self.page)}:{self.line}"


def page_name(page: Path) -> str:
    """The path below the repository, such as `docs/adapters.md`."""
    return str(page.relative_to(REPO)) if page.is_relative_to(REPO) else page.name


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """Every fenced block and every hidden block, in order."""
    found: list[Block] = []
    reason = None
    for token in _tokens(page, text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            found.append(Block(page, line, token.info.strip(), token.content, reason))
            reason = None
        elif token.type == "html_block":
            not_run, before = NOT_RUN.fullmatch(token.content), BEFORE.fullmatch(token.content)
            reason = not_run["reason"] if not_run else None
            if before:
                found.append(Block(page, line, before["language"], before["text"], hidden=True))
        elif token.nesting >= 0 and token.type not in ("paragraph_open", "inline"):
            reason = None  # something stands between the comment and the next block
    return found


def headings(page: Path, text: str | None = None) -> list[tuple[int, str]]:
    """Level and text of each heading."""
    return [
        (int(opened.tag[1]), _plain_text(inline))
        for opened, inline in pairwise(_tokens(page, text))
        if opened.type == "heading_open"
    ]


def anchors(page: Path, text: str | None = None) -> set[str]:
    """The anchors of the headings, as GitHub and the site make them."""
    seen: Counter[str] = Counter()
    found = set()
    for _, heading in headings(page, text):
        slug = slug_of(heading)
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def slug_of(heading: str) -> str:
    letters = re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", heading).strip().lower())
    return letters.replace(" ", "-")


def links(page: Path, text: str | None = None) -> list[tuple[int, str]]:
    """Line and target of each link and each image."""
    found = []
    for token in _tokens(page, text):
        line = token.map[0] + 1 if token.map else 0
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                found.append((line, str(target)))
    return found


@cache  # several tests read each page
def _tokens(page: Path, text: str | None) -> list[Token]:
    source = page.read_text(encoding="utf-8") if text is None else text
    return MarkdownIt("commonmark").enable("table").parse(source)


def _plain_text(inline: Token) -> str:
    return "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
