from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools.benchmark.__main__ import main

pytestmark = pytest.mark.full

SMALL = ["--task", "rule-sentiment", "--model", "tiny-roberta", "--steps", "2", "--limit", "20"]


def test_the_command_writes_a_record_of_two_formats(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    sizes = ["--speed-steps", "1", "--rounds", "1", "--forms", "fp32,int8"]
    assert main(["quantised", *SMALL, *sizes, "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["quality"].keys() == record["speed"].keys() == {"fp32", "int8"}
    assert record["quality"]["fp32"]["parameters"] == record["quality"]["int8"]["parameters"]
    assert record["quality"]["fp32"]["merged"] is None
    merged = record["quality"]["int8"]["merged"]
    assert 0 < merged["drift"]["of_weight"] < merged["drift"]["of_delta"]
    assert record["inference"]["of"] == "fp32"
    moved = {name: each["logits_moved"] for name, each in record["inference"]["precisions"].items()}
    assert moved.pop("fp32") == 0
    assert all(0 < each < 1 for each in moved.values())
    packed, plain = record["speed"]["int8"], record["speed"]["fp32"]
    assert packed["base_bytes"] < plain["base_bytes"]
    assert all(side["examples_per_second"]["median"] > 0 for side in (packed, plain))
    assert not re.search(r'"/|\.\./', output.read_text(encoding="utf-8")), "a record holds no path of this machine"


def test_invalid_options_are_reported_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantised", *SMALL, "--output", str(tmp_path / "a.json"), "--forms", "int4"]) == 2
    assert main(["quantised", *SMALL, "--output", str(tmp_path / "missing" / "a.json")]) == 2
    error = capsys.readouterr().err
    assert "--forms: expected some of fp32, bf16, int8, int8-bf16, nf4, nf4-bf16, found int4" in error
    assert f"--output {tmp_path / 'missing' / 'a.json'}" in error
    assert not list(tmp_path.iterdir())
