"""Every damaged input of `tests/support/damaged_inputs.py` is refused with one message, or the damage is harmless."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lora_hf.adapters.format import CONFIG_FILE
from lora_hf.cli.main import main
from tests.support.adapters_on_disk import run_folder
from tests.support.damaged_inputs import Adapters, Configs, Data, outcomes
from tests.support.malformed_requests import passed

RECORDS = Path(__file__).parents[2] / "docs" / "results" / "robustness"
MEMORY = 1_000_000_000  # bytes that no case may take

# How many other values each field of an adapter may have by PEFT's own rules: all others are refused.
HARMLESS = {
    "task_type": 6,
    "base_model_name_or_path": 5,  # the fingerprint tells the base, whatever its name
    "revision": 6,
    "inference_mode": 3,
    "lora_alpha": 1,
    "modules_to_save": 3,
    "fan_in_fan_out": 3,
    "init_lora_weights": 3,
    "rank_pattern": 3,
    "alpha_pattern": 3,
    "lora_dropout": 2,
    "use_rslora": 3,
    "bias": 1,
    "use_dora": 2,
    "lora_bias": 2,
    "trainable_token_indices": 4,
    "adapter_config.json": 1,  # without its last line break
}


def check(cases: list[dict[str, Any]], kind: str) -> list[str]:
    """Compares the cases with their record, which the page of results shows; returns those that were used."""
    recorded = json.loads((RECORDS / "input.json").read_text(encoding="utf-8"))
    assert {case["case"]: case["verdict"] for case in cases} == {
        case["case"]: case["verdict"] for case in recorded["cases"][kind]
    }
    assert Counter(case["verdict"] for case in cases) == recorded["counts"][kind]
    assert [case for case in cases if case["verdict"] == "escaped"] == []
    assert [case["case"] for case in cases if case["wrote"]] == []
    assert [case["case"] for case in cases if case["memory"] > MEMORY] == []
    assert [case["case"] for case in cases if case["verdict"] == "refused" and len(case["message"]) < 20] == []
    return [case["case"] for case in cases if case["verdict"] == "used"]


@pytest.mark.full
def test_no_damaged_adapter_is_used(tmp_path: Path) -> None:
    used = check(outcomes(Adapters, tmp_path), Adapters.kind)
    fields = [case.split(": ")[0] for case in used]
    assert {field: fields.count(field) for field in fields} == HARMLESS


@pytest.mark.full
def test_no_damaged_config_is_used(tmp_path: Path) -> None:
    used = check(outcomes(Configs, tmp_path), Configs.kind)
    assert not [case for case in used if case.startswith("text")]
    assert not [case for case in used if case.endswith((": nan", ": [[]]", "{'a': {'b': []}}"))]
    assert "output.name: '../../../etc/passwd'" not in used
    assert "output.name: ''" not in used


def test_no_damaged_data_are_used(tmp_path: Path) -> None:
    texts = {"empty", "blank", "NUL", "control characters", "one long word"}  # a text is a text; QQP has empty ones
    assert set(check(outcomes(Data, tmp_path), Data.kind)) == {f"sentence {text}" for text in texts}


def test_every_recorded_kill_was_resumed_bit_for_bit() -> None:
    """`test_survival` kills a few runs; the record holds more, killed at random moments."""
    if not (RECORDS / "kills.json").exists():
        pytest.skip("no kills are recorded: python -m tests.support.kills --output docs/results/robustness/kills.json")
    record = json.loads((RECORDS / "kills.json").read_text(encoding="utf-8"))
    assert len(record["kills"]) >= 20
    assert [kill["differences"] for kill in record["kills"]] == [[]] * record["exact"]
    assert len({kill["checkpoint"] for kill in record["kills"]}) > 2, "they were killed at different moments"
    assert not record["git"]["changed"]


def test_a_thousand_malformed_requests_broke_no_server() -> None:
    """`test_malformed_requests` sends fewer."""
    record = json.loads((RECORDS / "http.json").read_text(encoding="utf-8"))
    assert record["totals"]["malformed"] >= 1000
    assert passed(record)
    assert not record["git"]["changed"]


@pytest.mark.parametrize(
    ("verb", "damage", "message"),
    [
        ("eval", '{"peft_type": "LORA", "r": NaN}', "r: expected a whole number >= 1, found nan"),
        ("predict", "[" * 100_000, "levels of nesting"),
        ("merge", '{"peft_type": "LORA", "lora_alpha": -1}', "lora_alpha: expected a number > 0, found -1"),
    ],
)
def test_the_command_line_exits_with_2(
    verb: str, damage: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run_folder(tmp_path / "run")
    (adapter / CONFIG_FILE).write_text(damage)
    more = {"predict": ["--text", "a film"], "merge": ["--output", str(tmp_path / "merged")]}.get(verb, [])
    assert main([verb, "--adapter", str(adapter), *more]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert not (tmp_path / "merged").exists()
