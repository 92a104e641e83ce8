from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from email.message import Message
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lora_hf.cli.commands.info import OFFLINE, collect
from lora_hf.cli.main import main
from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.core.provenance import machine, versions
from lora_hf.lora.inject import count_parameters, inject
from lora_hf.models.load import load_model

REPO = Path(__file__).parents[2]


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"] == versions()
    assert info["versions"]["torch"] == importlib.metadata.version("torch")
    assert info["optional"]["peft"] == importlib.metadata.version("peft")
    assert {key: info["machine"][key] for key in machine()} == machine()
    assert 1 <= info["machine"]["usable_cores"] <= info["machine"]["cores"]
    assert info["machine"]["threads"] == torch.get_num_threads()
    assert len(info["machine"]["gpus"]) == torch.cuda.device_count()
    chosen = info["chosen"]
    assert chosen["auto_precision"] == ("bf16" if chosen["bf16_gain"] >= chosen["bf16_from"] else "fp32")
    assert "roberta" in chosen["padding_free"]
    assert "deberta-v2" in chosen["padded"]
    assert info["places"]["offline"] == list(OFFLINE), "the suite runs with the network cut"
    assert info["problem"] is None


def test_the_text_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    for line in (
        f"  torch             {importlib.metadata.version('torch')}",
        f"  with padding      {', '.join(collect()['chosen']['padded'])}",
        "  offline           HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_DATASETS_OFFLINE: the hub is not used",
        f"  system            {machine()['system']}",
    ):
        assert line in output.splitlines()


def test_no_secret_and_no_name_is_shown(
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
    output = capsys.readouterr().out
    for hidden in ("hidden", "someone", str(tmp_path), os.uname().nodename):
        assert hidden not in output
    assert "LORA_HF_DATA_DIR=~/data\n" in output
    assert "~/cache, then the hub" in output
    assert "HF_ENDPOINT" in output


def test_a_missing_data_folder_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LORA_HF_DATA_DIR", "nowhere")
    assert main(["info"]) == 0
    assert "LORA_HF_DATA_DIR=nowhere: no such folder" in capsys.readouterr().out


def test_missing_and_old_packages_are_listed_by_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2", "optuna>=4.5; extra == 'sweep'", "gradio>=6; extra == 'playground'", "ruff>=1; extra == 'dev'"]
    needs += ["uvicorn>=0.34; extra == 'serve'", "lora-hf[sweep]; extra == 'all'"]
    project = Message()
    for extra in ("sweep", "playground", "dev", "serve", "all"):
        project["Provides-Extra"] = extra
    installed = {"lora-hf": "1.0", "optuna": "4.4", "uvicorn": "0.34.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needs)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: project)
    info = collect()
    assert info["missing"] == {"sweep": ["optuna>=4.5"], "playground": ["gradio>=6"]}
    assert info["optional"] == {"gradio": None, "loralib": None, "optuna": "4.4", "peft": None, "uvicorn": "0.34.1"}


def test_a_clone_that_is_not_installed_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", _not_installed)
    info = collect()
    assert (info["missing"], info["versions"]["lora-hf"]) == ({}, "not installed")


def _not_installed(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


def test_it_runs_without_a_working_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert "torch             cannot be imported: ModuleNotFoundError" in output
    assert "precision: auto" not in output
    assert "  python            " in output


def test_the_bug_template_asks_for_it() -> None:
    assert "lora-hf info" in (REPO / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")


def test_the_modules_of_a_model_are_shown_without_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "tiny-gpt2", "--targets", "q,mlp.c_fc", "--r", "4", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)
    assert [(site["role"], site["fused"]) for site in model["sites"]] == [("q", True), ("mlp.c_fc", False)]
    counts = count_parameters(inject(base_of("tiny-gpt2"), LoraConfig(r=4, targets=("q", "mlp.c_fc"))))
    assert model["parameters"] == counts.lora
    assert main(["info", "--model", "tiny-gpt2", "--targets", "qq"]) == 2
    assert "matches 'qq' (did you mean 'q'?)" in capsys.readouterr().err


def base_of(name: str) -> PreTrainedModel:
    return load_model(ModelConfig(name=name, precision="fp32"), "causal-lm")
