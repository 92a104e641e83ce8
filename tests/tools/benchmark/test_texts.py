"""The benchmarks of streamed texts and of packed bases, on a small random chat model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.chat_models import save_chat_model
from tools.benchmark import serve_texts
from tools.benchmark.__main__ import main

LORA = ["--r", "4", "--targets", "q,v"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.mark.full
def test_streamed_texts_are_checked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_texts, "_transformers", lambda *_: {"reason": "not asked"})
    output = tmp_path / "record.json"
    sizes = ["--precision", "fp32", "--clients", "4", "--seconds", "2", "--new-tokens", "8"]
    assert main(["serve-texts", "--model", str(model), *LORA, *sizes, "--output", str(output)]) == 0
    assert "0 wrong texts" in capsys.readouterr().out
    record = json.loads(output.read_text(encoding="utf-8"))
    for part in ("alone", "one_adapter", "two_adapters"):
        assert record[part]["requests"] > 0
        assert record[part]["tokens"] > 0
        assert record[part]["errors"] == 0, record[part]["examples"]
    assert record["wrong"] == 0
    assert record["memory"]["after_mib"] > record["memory"]["without_models_mib"] / 2


def test_the_form_that_is_compared_with_itself_is_equal(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    words = ["--forms", "fp32,int8", "--new-tokens", "4", "--output", str(output)]
    assert main(["text-forms", "--model", str(model), *LORA, *words]) == 0
    forms = json.loads(output.read_text(encoding="utf-8"))["forms"]
    assert (forms["fp32"]["largest_difference"], forms["fp32"]["equal_texts"]) == (0, 1)
    assert 0 < forms["int8"]["mean_difference"] < 1
    assert forms["int8"]["base_mib"] < forms["fp32"]["base_mib"]


def test_unknown_forms_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["text-forms", "--forms", "fp32,int4"]) == 2
    assert "int4" in capsys.readouterr().err
