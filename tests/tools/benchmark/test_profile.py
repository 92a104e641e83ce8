"""The profile gives each operator a purpose, and its shares add up to the total time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmark.__main__ import main
from tools.benchmark.profile import _purpose


@pytest.mark.full
def test_the_shares_add_up_to_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    assert main(["profile", "--steps", "2", "--batch-size", "4", "--output", str(output)]) == 0
    shares = json.loads(output.read_text(encoding="utf-8"))["shares"]
    assert len(capsys.readouterr().out.splitlines()) == len(shares)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
    assert shares["products with frozen weights"] > 0
    assert shares["low-rank products"] > 0
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


@pytest.mark.parametrize(
    ("name", "shapes", "purpose"),
    [
        ("aten::mm", [[200, 768], [768, 3072]], "products with frozen weights"),
        ("aten::mm", [[200, 768], [768, 16]], "low-rank products"),
        ("aten::addmm_", [[200, 768], [200, 48], [48, 768]], "low-rank products"),
        ("aten::mm", [[200, 768], [768, 50257]], "head of the language model"),
        ("aten::bmm", [[24, 60, 64], [24, 64, 60]], "attention"),
        ("aten::copy_", [[768]], "copies and casts"),
        ("aten::nonzero", [[16, 80]], "other operators"),
    ],
)
def test_an_operator_has_one_purpose(name: str, shapes: list[list[int]], purpose: str) -> None:
    assert _purpose(name, shapes, 48, 50257) == purpose
