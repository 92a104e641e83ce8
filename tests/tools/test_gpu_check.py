"""The GPU check, rehearsed on the CPU with tiny shapes, and its tables."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import gpu_check
from tools.gpu.parts import PARTS, Part
from tools.gpu.parts import main as run_one_part
from tools.gpu.shapes import Check, sst2_rows
from tools.gpu.train import compare
from tools.gpu_check import main
from tools.tables.gpu import NOT_MEASURED, gpu

pytestmark = pytest.mark.minutes

# In place of a part: `a` and `d` never end, and `d` does not even listen; `c` finds something, then crashes.
PROGRAM = """
import json, os, signal, sys, time
letter, file = sys.argv[1], sys.argv[3]
if letter == "d":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if letter in "ad":
    time.sleep(3600)
with open(file, "w", encoding="utf-8") as output:
    json.dump({"results": {"check": {"holds": True}}, "bases": {letter: "random"}}, output)
if letter == "c":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def rehearse(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "gpu.json"
    code = main(["--rehearse", "--output", str(file), *options])
    return code, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # those of PEFT and of torch.compile
def test_the_rehearsal_runs_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_process = gpu_check._run_part

    def run_part(letter: str, budget: float, options: list[str]) -> dict[str, Any]:
        """The last part in a process of its own, as in earnest; the others here, where torch is imported already."""
        if letter == list(PARTS)[-1]:
            return in_a_process(letter, budget, options)
        file, deadline = tmp_path / f"{letter}.json", time.monotonic() + budget
        run_one_part([letter, "--output", str(file), "--deadline", str(deadline), *options])
        return json.loads(file.read_text(encoding="utf-8")) | {"seconds": 1.0}

    monkeypatch.setattr(gpu_check, "_run_part", run_part)
    code, record = rehearse(tmp_path, "--seconds", "30000")
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


@pytest.mark.full
def test_a_part_that_never_ends_is_stopped_and_the_others_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = {"a": 0.5, "c": 400, "d": 0.5, "e": 400}
    monkeypatch.setattr(gpu_check, "PARTS", {key: Part(key, value, lambda check: ()) for key, value in seconds.items()})
    monkeypatch.setattr(gpu_check, "CHILD", (sys.executable, "-c", PROGRAM))
    code, record = rehearse(tmp_path)
    parts, found = record["parts"], {"check": {"holds": True}}
    assert code == 1
    assert [key for key, part in parts.items() if "stopped" in part] == ["a", "d"]
    assert parts["a"]["results"] == {}
    assert parts["e"]["results"] == found
    assert "-9" in parts["c"]["results"].pop("failed")
    assert parts["c"]["results"] == found, "what it found before"
    assert record["bases"] == {"c": "random", "e": "random"}
    assert [line[:3] for line in capfd.readouterr().err.splitlines() if "stopped" in line] == ["(a)", "(d)"]
    assert gpu(tmp_path).count("stopped after") == 2


@pytest.mark.full
def test_with_a_folder_of_models_their_weights_are_trained(real_models: Path) -> None:
    check = Check(torch.device("cpu"), real_models, True, time.monotonic() + 3600, {})
    peft = ("peft-default",) if importlib.util.find_spec("peft") else ()
    found = compare(check, "minilm", sst2_rows(4), ("lora", "frozen", *peft), 2, 1, 1e12)
    assert found["weights"] == "pretrained"
    assert all(side["agrees"] for side in found["sides"].values()), found
    check.build("smollm2", torch.bfloat16)
    assert check.weights["smollm2"] == "pretrained"


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
