"""`score` on files, with and without Java, and on files that cannot be scored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_hf.data.metrics.requirements import ScorerError
from tests.support.command_lines import ask

REPO = Path(__file__).parents[2]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR, ROUGE_L and CIDEr need Java 8 or newer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out.txt").write_text("The Vaults is a pub.\nThe Mill serves cheap food.\n", encoding="utf-8")
    (tmp_path / "refs.txt").write_text(
        "The Vaults is a pub.\nA pub: The Vaults.\n\nThe Mill serves cheap food.\n", encoding="utf-8"
    )
    (tmp_path / "lex").mkdir()
    (tmp_path / "lex" / "test-reference0.lex").write_text("the vaults is a pub .\nthe mill serves cheap food .\n")
    (tmp_path / "lex" / "test-reference1.lex").write_text("a pub : the vaults .\n\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture(autouse=True)
def _in_an_empty_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder / "empty")
    yield
    assert not list((folder / "empty").iterdir()), "nothing is written"


@pytest.mark.full
@needs_java
def test_json_holds_the_scores_and_their_tools(folder: Path) -> None:
    # Some schedulers close standard input; Java must not depend on it.
    script = f'exec "{sys.executable}" "{REPO}/scripts/score.py" "$@" <&-'
    words = ["--task", "e2e_nlg", "--predictions", folder / "out.txt", "--references", folder / "refs.txt", "--json"]
    done = subprocess.run(["sh", "-c", script, "sh", *words], cwd=folder / "empty", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["scores"]) == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]
    assert result["scores"]["BLEU"] == pytest.approx(1)
    assert result["scores"]["METEOR"] == pytest.approx(1)
    assert result["tools"]["BLEU"] == "mteval-v13a"
    assert result["missing"] == {}


@pytest.mark.usefixtures("without_java")
def test_without_java_the_other_scores_are_printed() -> None:
    words = ["--task", "dart", "--predictions", "../out.txt", "--references", "../lex"]
    done = ask("score", *words)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["BLEU", "METEOR", "TER"]
    assert "null" in done.stdout.splitlines()[1]
    assert "multi-bleu.perl -lc" in done.stdout.splitlines()[0]
    assert done.stderr.count("METEOR: needs Java 8") == 1


def test_a_file_of_which_nothing_can_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> float:
        raise ScorerError("needs sacrebleu, which is not installed")

    for name in ("summaries.rouge", "translation.sacre_bleu", "translation.chrf"):
        monkeypatch.setattr(f"lora_hf.data.metrics.{name}", missing)
    words = ["--task", "rouge_bleu", "--predictions", "../out.txt", "--references", "../refs.txt"]
    done = ask("score", *words, code=2)
    assert done.stdout == ""
    assert "none of its scores can be computed: needs sacrebleu" in done.stderr


def test_a_crash_of_java_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder / "bin"))
    (folder / "bin").mkdir()
    (folder / "bin" / "java").write_text("#!/bin/sh\necho no runtime here >&2\nexit 3\n")
    (folder / "bin" / "java").chmod(0o755)
    words = ["--task", "e2e_nlg", "--predictions", "../out.txt", "--references", "../refs.txt", "--json"]
    result = json.loads(ask("score", *words).stdout)
    assert [name for name, value in result["scores"].items() if value is None] == ["METEOR", "ROUGE_L", "CIDEr"]
    assert "exit code 3" in result["missing"]["CIDEr"]
    assert "no runtime here" in result["missing"]["CIDEr"]


def test_torch_is_not_imported(folder: Path) -> None:
    code = "import sys; from lora_hf.cli.main import main; main(); assert not {'torch', 'evaluate'} & set(sys.modules)"
    words = ["--task", "dart", "--predictions", folder / "out.txt", "--references", folder / "refs.txt"]
    environment = os.environ | {"PATH": str(folder / "empty")}
    done = subprocess.run(
        [sys.executable, "-c", code, "score", *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("task", "predictions", "message"),
    [
        ("e2e", b"a\nb\n", "'e2e' (did you mean 'e2e_nlg'?)"),
        ("e2e_nlg", b"a\n", "found 1"),
        ("e2e_nlg", b"a\n\n", "bad.txt, line 2: "),
        ("e2e_nlg", b"a\nb\xff\n", "bad.txt, line 2: not UTF-8"),
        ("e2e_nlg", None, "bad.txt: "),
    ],
)
def test_an_error_is_one_message_and_exit_code_2(
    task: str, predictions: bytes | None, message: str, folder: Path
) -> None:
    if predictions is not None:
        (folder / "bad.txt").write_bytes(predictions)
    words = ["--task", task, "--predictions", "../bad.txt", "--references", "../refs.txt"]
    done = ask("score", *words, code=2)
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert not done.stdout
