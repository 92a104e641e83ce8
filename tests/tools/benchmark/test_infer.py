"""The inference comparison runs every side on the same rows, and the sides that must agree do."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch

from lora_hf.cli.main import main
from lora_hf.core.config.schema import RunConfig
from tests import tolerances
from tools.benchmark import answering, infer
from tools.benchmark.infer import SIDES, _rows
from tools.benchmark.work import Work
from tools.benchmark.worker import Channel, serve

pytestmark = pytest.mark.usefixtures("forked")

CONFIG = RunConfig.from_dict(
    {"model": {"name": "tiny-roberta", "precision": "fp32"}, "task": {"name": "rule-sentiment"}}
)


def test_a_record_of_two_sides_in_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(infer, "SIDES", ("mixed", "peft-names"))
    words = ["infer", "--rows", "16", "--rounds", "1", "--r", "2", "--targets", "q,v", "--json"]
    assert main(words, verb="benchmark") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["sides"]) == {"mixed", "peft-names"}
    assert (result["work"]["rows"], result["work"]["adapters"]) == (16, 8)
    assert set(result["ratios"]) == {"mixed/peft-names"}
    assert 0 < result["sides"]["mixed"]["switch_seconds"] < 1
    assert len(result["sides"]["peft-names"]["seconds"]) == 1


def test_every_side_has_an_answer() -> None:
    assert set(SIDES) == set(answering.ANSWERING)


@pytest.mark.parametrize("side", SIDES)
def test_every_side_speaks_the_protocol(side: str) -> None:
    out, order = io.StringIO(), Work(side, CONFIG.to_dict(), _rows(CONFIG, 16), 2, 0.0)
    serve(Channel(io.StringIO(order.to_line() + "\ngo\ngo\n"), out))
    ready, *rounds, done = (json.loads(line) for line in out.getvalue().splitlines())
    assert ready == {"ready": {}}
    assert len(rounds) == 2
    assert all(each["round"]["seconds"] > 0 for each in rounds)
    assert done["done"].keys() == ({"switch_seconds"} if side == "mixed" else set())


def test_mixed_and_apart_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(CONFIG, 24)
    found: dict[str, list[Any]] = {"mixed": [], "apart": []}
    for side, answers in found.items():
        original = answering.batched_logits

        def keep(*args: Any, answers: list[Any] = answers, original: Any = original) -> Any:
            answers.extend(original(*args))

        monkeypatch.setattr(answering, "batched_logits", keep)
        answer, _ = answering.build(Work(side, CONFIG.to_dict(), rows, 1, 0.0))
        answer()
        monkeypatch.undo()
    names = [row["adapter"] for row in rows]
    order = [place for name in dict.fromkeys(names) for place, other in enumerate(names) if other == name]
    mixed = torch.tensor([found["mixed"][place].tolist() for place in order])
    torch.testing.assert_close(
        mixed, torch.tensor([row.tolist() for row in found["apart"]]), atol=tolerances.MIXED_FP32, rtol=0
    )


def test_too_few_rows_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "--rows", "3"], verb="benchmark") == 2
    assert "at least 8" in capsys.readouterr().err
