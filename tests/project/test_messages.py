"""The messages that docs/troubleshooting.md quotes exist in the code, and its translation quotes the same ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGES = sorted((REPO / "docs").glob("troubleshooting*.md"))
VALUE = "\0"  # marks a value that an f-string fills in


def texts() -> Iterator[str]:
    """Every string in the package."""
    for file in sorted((REPO / "lora_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@cache
def distinct_texts() -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts()))


def quotes(page: Path) -> list[str]:
    return re.findall(r"^> (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


def is_in_code(quote: str) -> bool:
    """Whether a string of the package contains the quote; `...` stands for any text."""
    pattern = re.compile(r".*?".join(re.escape(part) for part in quote.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in distinct_texts())


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_messages_are_in_the_code(page: Path) -> None:
    found = quotes(page)
    assert len(found) > 20
    assert [quote for quote in found if not is_in_code(quote)] == []
    assert found == quotes(PAGES[0]), "every language quotes the same messages"


@pytest.mark.full
def test_a_quote_that_is_not_in_the_code_is_found() -> None:
    real = quotes(PAGES[0])[0]
    assert is_in_code(real)
    assert not is_in_code(f"{real} no message ends like this")
