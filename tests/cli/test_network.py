"""With local data and a local base no verb contacts another machine, and no token ends up in a file or output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.network_audit import NETWORKED
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.full

REPO = Path(__file__).parents[2]
TOKENS = {"HF_TOKEN": "hf_aTokenOfNobody", "LORA_HF_TOKEN": "the-token-of-a-server"}
VERBS = (
    "train", "eval", "predict", "generate", "score", "merge", "export", "combine", "compare", "push --dry-run", "serve",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all verbs ran in, with their output in `output.txt`."""
    folder = tmp_path_factory.mktemp("audit")
    online = {name: value for name, value in os.environ.items() if not name.upper().endswith(("_OFFLINE", "_PROXY"))}
    del online["HF_HUB_DISABLE_TELEMETRY"]
    online["PATH"] = ""  # no Java, which takes seconds to start and would not be under the hook
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.network_audit", str(folder)],
        cwd=REPO, env={**online, **TOKENS, "HF_HOME": str(folder / "cache")},
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def audit(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_contacts_another_machine(verb: str, audit: dict[str, Any]) -> None:
    assert audit[verb]["code"] == 0
    assert audit[verb]["contacted"] == []


def test_the_hook_records_contacts(audit: dict[str, Any]) -> None:
    """Otherwise the test above could not fail."""
    assert audit["push"]["code"] == 2
    assert all("huggingface.co" in audit[name]["contacted"] for name in NETWORKED)


def test_a_server_listens_only_on_loopback(audit: dict[str, Any]) -> None:
    assert audit["serve"]["listened"] == ["127.0.0.1"]
    refused, answer = audit["serve"]["answers"]
    assert refused == 401
    assert answer["adapter"] == "a"
    # urllib3 tests on import whether IPv6 works.
    assert {address for verb in VERBS for address in audit[verb]["listened"]} <= {"127.0.0.1", "::1"}


def test_no_token_is_left_behind(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    expected = {
        "record.json",
        "config.yaml",
        "log.jsonl",
        "trainer_state.json",
        "comparison.json",
        "merge.json",
        "output.txt",
    }
    assert expected <= names
    for file in files:
        for token in TOKENS.values():
            assert token.encode() not in file.read_bytes(), file
