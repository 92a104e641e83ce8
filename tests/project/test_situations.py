"""The records of situations and attacks: each situation names tests that exist, and every kind has some."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lora_hf.core.parsing import read_json

REPO = Path(__file__).parents[2]
RECORDS = REPO / "docs" / "results" / "robustness"


def record(name: str) -> dict[str, Any]:
    return read_json(RECORDS / name)


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", record("situations.json")["situations"], ids=lambda row: row["situation"][:60])
def test_a_situation_is_held_by_tests_of_the_suite(row: dict[str, Any]) -> None:
    assert row.keys() == {"kind", "situation", "before", "now", "tests"}
    assert row["tests"]
    for test in row["tests"]:
        file, _, function = test.partition("::")
        assert function in functions(file), test


def test_every_kind_has_situations() -> None:
    content = record("situations.json")
    assert {row["kind"] for row in content["situations"]} == set(content["kinds"])


def test_every_attack_says_what_happened_before_and_after() -> None:
    content = record("attacks.json")
    names = [row["name"] for row in content["attacks"]]
    assert len(set(names)) == len(names)
    for row in content["attacks"]:
        assert row.keys() == {"name", "tries", "before", "after"}
        assert all(row.values()), row
