"""The GPU check, rehearsed on the CPU with tiny shapes, and its tables."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu_check import PARTS, main
from tools.tables.gpu import NOT_MEASURED, gpu


def rehearse(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "gpu.json"
    code = main(["--rehearse", "--output", str(file), *options])
    return code, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.full
def test_the_rehearsal_runs_every_part(tmp_path: Path) -> None:
    code, record = rehearse(tmp_path, "--seconds", "3000")
    text = json.dumps(record["parts"], indent=1)
    assert '"failed"' not in text, text
    assert '"holds": false' not in text, text
    assert '"agrees": false' not in text, text
    assert code == 0
    assert record["parts"].keys() == PARTS.keys()
    assert set(record["bases"].values()) == {"random"}
    trained = record["parts"]["b"]["results"]["SST-2"]["sides"]
    assert trained["lora"]["unmoved_lora_B"] == 0
    if importlib.util.find_spec("peft"):
        assert trained["peft-default"]["trained_parameters"] == trained["lora"]["trained_parameters"]
    tables = gpu(tmp_path)
    assert "| SST-2 | random | lora |" in tables
    assert "CPU" in tables


def test_what_has_no_time_left_is_skipped_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = rehearse(tmp_path, "--seconds", "5")
    assert code == 0
    assert all("s were left" in part["skipped"] for part in record["parts"].values())
    assert "skipped" in gpu(tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == len(PARTS)


def test_without_a_gpu_it_says_how_to_rehearse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_without_a_record_the_table_says_so(tmp_path: Path) -> None:
    assert gpu(tmp_path) == NOT_MEASURED
