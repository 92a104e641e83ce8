"""What the pages hold: blocks of code, headings and links, and which blocks are not run, with the reason.

A block that cannot run in the suite has a comment before it that readers do not see: `<!-- not run: needs the hub -->`.
What must be there before a block, such as an adapter that a reader has trained, is made by a hidden block:
`<!-- before: bash`, commands, `-->`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPO = Path(__file__).parents[2]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])
RUN = ("bash", "python")
NOT_RUN = re.compile(r"\s*<!-- not run: (?P<reason>.+?) -->\s*", re.DOTALL)
BEFORE = re.compile(r"\s*<!-- before: (?P<language>bash|python)\n(?P<text>.*?)-->\s*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code; `not_run` is the reason that its page gives, or None where it is run."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None = None
    hidden: bool = False

    def __str__(self) -> str:
        return f"{page_name(self.page)}:{self.line}"


def page_name(page: Path) -> str:
    """`docs/adapters.md`."""
    return str(page.relative_to(REPO)) if page.is_relative_to(REPO) else page.name


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """Every fenced block of the page, and every hidden one, in order."""
    found: list[Block] = []
    reason = None
    for token in _tokens(page, text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            found.append(Block(page, line, token.info.strip(), token.content, reason))
            reason = None
        elif token.type == "html_block":
            marked, before = NOT_RUN.fullmatch(token.content), BEFORE.fullmatch(token.content)
            reason = marked["reason"] if marked else None
            if before:
                found.append(Block(page, line, before["language"], before["text"], hidden=True))
        elif token.nesting >= 0 and token.type not in ("paragraph_open", "inline"):
            reason = None
    return found


def headings(page: Path, text: str | None = None) -> list[tuple[int, str]]:
    """Level and words of each heading."""
    return [
        (int(opened.tag[1]), _words(inline))
        for opened, inline in pairwise(_tokens(page, text))
        if opened.type == "heading_open"
    ]


def anchors(page: Path, text: str | None = None) -> set[str]:
    """What a link may name behind `#`: the headings as GitHub writes them, and so does the site."""
    seen: Counter[str] = Counter()
    found = set()
    for _, words in headings(page, text):
        slug = slug_of(words)
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def slug_of(words: str) -> str:
    """The anchor of a heading."""
    kept = re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", words).strip().lower())
    return kept.replace(" ", "-")


def links(page: Path, text: str | None = None) -> list[tuple[int, str]]:
    """Line and target of each link and each picture."""
    found = []
    for token in _tokens(page, text):
        line = token.map[0] + 1 if token.map else 0
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                found.append((line, str(target)))
    return found


def _tokens(page: Path, text: str | None) -> list[Token]:
    source = page.read_text(encoding="utf-8") if text is None else text
    return MarkdownIt("commonmark").enable("table").parse(source)


def _words(inline: Token) -> str:
    return "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
