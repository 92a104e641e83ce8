from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from email.message import Message
from pathlib import Path

import pytest
import torch

from lora_hf.cli.commands.info import look_around
from lora_hf.cli.main import environment, main
from lora_hf.core.provenance import machine, versions

REPO = Path(__file__).parents[2]


def test_it_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"] == versions()
    assert told["versions"]["torch"] == torch.__version__
    assert told["optional"]["peft"] == importlib.metadata.version("peft")
    assert {key: told["machine"][key] for key in machine()} == machine()
    assert 1 <= told["machine"]["usable_cores"] <= told["machine"]["cores"]
    assert told["machine"]["threads"] == torch.get_num_threads()
    assert len(told["machine"]["gpus"]) == torch.cuda.device_count()
    chosen = told["chosen"]
    assert chosen["auto_precision"] == ("bf16" if chosen["bf16_gain"] >= chosen["bf16_from"] else "fp32")
    assert "roberta" in chosen["padding_free"]
    assert chosen["padded"] == ["deberta-v2"]
    assert told["places"]["offline"] == list(environment.OFFLINE), "the suite runs with the network cut"
    assert told["problem"] is None


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for line in (
        f"  torch             {torch.__version__}",
        "  with padding      deberta-v2",
        "  offline           HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_DATASETS_OFFLINE: the hub is not asked",
        f"  system            {machine()['system']}",
    ):
        assert line in said.splitlines()


def test_no_secret_and_no_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "someone"
    (home / "data").mkdir(parents=True)
    secrets = {
        "HF_TOKEN": "hf_hidden",
        "LORA_HF_TOKEN": "hidden-bearer",
        "HF_ENDPOINT": "https://hidden-host.example",
        "HTTPS_PROXY": "http://hidden-user:hidden-word@127.0.0.1:9",
    }
    for name, value in {**secrets, "HOME": str(home), "HF_HOME": str(home / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LORA_HF_DATA_DIR", str(home / "data"))
    assert main(["info"]) == 0
    assert main(["info", "--json"]) == 0
    said = capsys.readouterr().out
    for hidden in ("hidden", "someone", str(tmp_path), os.uname().nodename):
        assert hidden not in said
    assert "LORA_HF_DATA_DIR=~/data\n" in said
    assert "~/cache, then the hub" in said
    assert "HF_ENDPOINT names another than the hub" in said


def test_a_data_folder_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_HF_DATA_DIR", "nowhere")
    assert main(["info"]) == 0
    assert "LORA_HF_DATA_DIR=nowhere, which is not a folder" in capsys.readouterr().out


def test_missing_and_old_packages_are_told_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2", "optuna>=4.5; extra == 'sweep'", "gradio>=6; extra == 'playground'", "ruff>=1; extra == 'dev'"]
    needs += ["uvicorn>=0.34; extra == 'serve'", "lora-hf[sweep]; extra == 'all'"]
    project = Message()
    for extra in ("sweep", "playground", "dev", "serve", "all"):
        project["Provides-Extra"] = extra
    installed = {"optuna": "4.4", "uvicorn": "0.34.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needs)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: project)
    found = look_around()
    assert found.missing == {"sweep": ["optuna>=4.5"], "playground": ["gradio>=6"]}
    assert found.optional == {"gradio": None, "loralib": None, "optuna": "4.4", "peft": None, "uvicorn": "0.34.1"}


def test_it_runs_where_torch_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "torch             cannot be imported: ModuleNotFoundError" in said
    assert "precision: auto" not in said
    assert "  python            " in said


def test_a_report_of_a_bug_asks_for_it() -> None:
    assert "lora-hf info" in (REPO / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
