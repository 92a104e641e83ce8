"""With local data and a local base no verb reaches beyond this machine, and no token gets into what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.verbs_alone import ASKED_BY_PURPOSE

REPO = Path(__file__).parents[2]
TOKENS = {"HF_TOKEN": "hf_aTokenOfNobody", "LORA_HF_TOKEN": "the-token-of-a-server"}
VERBS = (
    "train", "eval", "predict", "generate", "score", "merge", "combine", "compare", "push --dry-run", "serve",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all verbs have run, with what they said in `said.txt`."""
    folder = tmp_path_factory.mktemp("alone")
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith(("_OFFLINE", "_PROXY"))}
    del kept["HF_HUB_DISABLE_TELEMETRY"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.verbs_alone", str(folder)],
        cwd=REPO, env={**kept, **TOKENS, "HF_HOME": str(folder / "cache")}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def noted(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "noted.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_reaches_nobody(verb: str, noted: dict[str, Any]) -> None:
    assert noted[verb]["code"] == 0
    assert noted[verb]["asked"] == []


def test_what_is_to_reach_out_is_noted(noted: dict[str, Any]) -> None:
    """Else the test above would hear nothing, whatever happened."""
    assert noted["push"]["code"] == 2
    assert all("huggingface.co" in noted[name]["asked"] for name in ASKED_BY_PURPOSE)


def test_a_server_listens_on_loopback_alone(noted: dict[str, Any]) -> None:
    assert noted["serve"]["listened"] == ["127.0.0.1"]
    refused, answer = noted["serve"]["answers"]
    assert refused == 401
    assert answer["adapter"] == "a"
    # urllib3 tries on import whether there is an IPv6.
    assert {address for verb in VERBS for address in noted[verb]["listened"]} <= {"127.0.0.1", "::1"}


def test_no_token_is_left_behind(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    left = {
        "record.json",
        "config.yaml",
        "log.jsonl",
        "trainer_state.json",
        "comparison.json",
        "merge.json",
        "said.txt",
    }
    assert left <= names
    for file in files:
        for token in TOKENS.values():
            assert token.encode() not in file.read_bytes(), file
