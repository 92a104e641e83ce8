"""The messages that docs/troubleshooting.md quotes stand in the code as they are quoted, whatever the language."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGES = sorted((REPO / "docs").glob("troubleshooting*.md"))
VALUE = "\0"  # what an f-string fills in


def texts() -> Iterator[str]:
    """Every text of the package, with a mark for each value that is filled in."""
    for file in sorted((REPO / "lora_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


TEXTS = tuple(dict.fromkeys(texts()))


def quotes(page: Path) -> list[str]:
    return re.findall(r"^> (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


def is_said(quote: str) -> bool:
    """Whether a text of the package is the quote, with values where this has `...`."""
    between = r".*?"
    pattern = re.compile(between.join(re.escape(part) for part in quote.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_messages_are_ours(page: Path) -> None:
    found = quotes(page)
    assert len(found) > 20
    assert [quote for quote in found if not is_said(quote)] == []
    assert found == quotes(PAGES[0]), "every language quotes the same"


def test_a_message_that_nobody_says_is_found() -> None:
    assert not is_said("the optimiser got no parameters at all")
    assert is_said("the loss is ... at step ...: lower train.lr")
