"""The inference benchmark runs every side on the same rows, and our sides agree."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch

from lora_hf.core.config.schema import RunConfig
from tests import tolerances
from tools.benchmark import infer, infer_sides
from tools.benchmark.__main__ import main
from tools.benchmark.infer import inference_rows
from tools.benchmark.job import INFER_SIDES, Job
from tools.benchmark.worker import Channel, run

CONFIG = RunConfig.from_dict(
    {"model": {"name": "tiny-roberta", "precision": "fp32"}, "task": {"name": "rule-sentiment"}}
)


@pytest.mark.full
def test_the_command_prints_a_record_of_two_sides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(infer, "INFER_SIDES", ("mixed", "peft-names"))
    assert main(["infer", "--rows", "16", "--rounds", "1", "--r", "2", "--targets", "q,v", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["sides"]) == {"mixed", "peft-names"}
    assert (result["work"]["rows"], result["work"]["adapters"]) == (16, 8)
    assert set(result["ratios"]) == {"mixed/peft-names"}
    assert result["sides"]["mixed"]["switch_seconds"] > 0
    assert len(result["sides"]["peft-names"]["seconds"]) == 1


def test_every_side_is_implemented() -> None:
    assert set(INFER_SIDES) == set(infer_sides.SIDES)


@pytest.mark.full
@pytest.mark.parametrize("side", INFER_SIDES)
def test_every_side_follows_the_protocol(side: str) -> None:
    out, job = io.StringIO(), Job(side, CONFIG.to_dict(), inference_rows(CONFIG, 16), rounds=2)
    run(Channel(io.StringIO(job.to_line() + "\ngo\ngo\n"), out))
    ready, *rounds, done = (json.loads(line) for line in out.getvalue().splitlines())
    assert ready == {"ready": {}}
    assert len(rounds) == 2
    assert all(each["round"]["seconds"] > 0 for each in rounds)
    assert done["done"].keys() == ({"switch_seconds"} if side == "mixed" else set())


def test_mixed_and_apart_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = inference_rows(CONFIG, 24)
    found: dict[str, list[Any]] = {"mixed": [], "apart": []}
    for side, logits in found.items():
        original = infer_sides.batched_logits

        def keep(*args: Any, logits: list[Any] = logits, original: Any = original) -> Any:
            logits.extend(original(*args))

        monkeypatch.setattr(infer_sides, "batched_logits", keep)
        predict, _ = infer_sides.build(Job(side, CONFIG.to_dict(), rows, rounds=1))
        predict()
        monkeypatch.undo()
    names = [row["adapter"] for row in rows]
    order = [index for name in dict.fromkeys(names) for index, other in enumerate(names) if other == name]
    mixed = torch.tensor([found["mixed"][index].tolist() for index in order])
    torch.testing.assert_close(
        mixed, torch.tensor([row.tolist() for row in found["apart"]]), atol=tolerances.MIXED_FP32, rtol=0
    )


def test_too_few_rows_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "--rows", "3"]) == 2
    error = capsys.readouterr().err
    assert "--rows 3" in error
    assert "at least 8" in error
