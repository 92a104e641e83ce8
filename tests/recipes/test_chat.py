"""SmolLM2 learns a way to answer from 200 conversations: what it says to new ones, and where it stops."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.support.chats import SIGN, taught_rows, write_rows
from tests.support.command_lines import ask, last_json

pytestmark = pytest.mark.full


def test_smollm2_answers_as_taught(real_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "data/train.jsonl", taught_rows(200))
    write_rows(tmp_path / "data/validation.jsonl", taught_rows(2, seed=1))
    words = [f"model.name={real_models / 'smollm2'}", "model.precision=fp32", f"task.data_dir={tmp_path / 'data'}"]
    words += ["train.max_steps=28", "train.batch_size=2", "train.lr=3e-3", "lora.layers=[24,25,26,27,28,29]"]
    ask(
        "train",
        "--config",
        "chat_smollm2.yaml",
        *words,
        f"output.dir={tmp_path}",
        "output.plots=false",
        "output.name=run",
    )
    adapter = tmp_path / "run/adapter"
    asked = [{"role": "user", "content": "Send 3 × lamp to Lyon, please.\n\nWhen? 🚲"}]
    write_rows(tmp_path / "held-out.jsonl", [{"messages": asked}])
    made = ["--input", tmp_path / "held-out.jsonl", "--max-new-tokens", "40", "--json"]
    text = last_json(ask("generate", "--adapter", adapter, *made))["texts"][0]["text"]
    assert text == f"- lamp: 3\n- Lyon\n\n{SIGN}", "with its line breaks, and nothing after the end of the turn"
    monkeypatch.setattr("sys.stdin", io.StringIO("Send 4 × guitar to Bergen, please.\n"))
    done = ask("chat", "--adapter", adapter, "--max-new-tokens", "40", "--json")
    assert SIGN in json.loads(done.stdout.splitlines()[-1])["messages"][1]["content"]
