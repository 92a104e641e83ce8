"""Runs every bash and Python block of README and docs, page by page and in order.

Nothing is downloaded. The package's small bases stand in for models of the hub, in the cache where transformers looks
for them, and rule-based rows stand in for the datasets, in the layout of a data folder. Translations have the blocks of
their English page (tests/docs/test_pages.py), so only English pages run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset

from lora_hf.data.synthetic import rule_restaurants, rule_sentiment
from lora_hf.data.tasks.glue import GLUE
from lora_hf.models.model_ids import HUB_IDS
from tests.support import page_hooks
from tests.support.pages import PAGES, REPO, RUN, blocks, page_name
from tests.support.warm import Session, Warm

ROWS = 24
BASES = REPO / "lora_hf" / "models" / "bases"
STAND_INS = {
    **{HUB_IDS[name]: "tiny-roberta" for name in ("roberta-base", "roberta-large")},
    **{HUB_IDS[name]: "tiny-gpt2" for name in ("gpt2", "gpt2-medium", "gpt2-large")},
}
COMMIT = "0" * 40  # of each stand-in
PAGES_THAT_RUN = [
    page
    for page in PAGES
    if not page.name.endswith(".vi.md") and any(b.language in RUN and not b.not_run for b in blocks(page))
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked, and their sockets are Linux's")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `../shared` of the pages, with a few rows of every task."""
    folder = tmp_path_factory.mktemp("shared")
    sentences = [row["sentence"] for row in rule_sentiment("train")[: 2 * ROWS]]
    for task in GLUE:
        step = len(task.text_columns)
        texts = {column: sentences[first::step][:ROWS] for first, column in enumerate(task.text_columns)}
        labels = [row % task.num_labels if task.label_names else row % 6 * 1.0 for row in range(ROWS)]
        tests = (split.replace("validation", "test") for split in task.evaluation_splits)
        for split in ("train", *task.evaluation_splits, *tests):
            _write(folder / "data" / "glue" / task.name / f"{split}.parquet", {**texts, "label": labels})
    meanings = rule_restaurants("train")[:ROWS]
    for split in ("train", "validation", "test"):
        columns = {key: [row[key] for row in meanings] for key in ("meaning_representation", "human_reference")}
        _write(folder / "data" / "e2e_nlg" / f"{split}.parquet", columns)
    for name, base in {"roberta-base-tokenizer": "tiny-roberta", "gpt2-tokenizer": "tiny-gpt2"}.items():
        (folder / "models" / name).mkdir(parents=True)
        for file in (BASES / base).glob("tokenizer*"):
            shutil.copy(file, folder / "models" / name)
    return folder


def _write(file: Path, columns: dict[str, list]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({**columns, "idx": list(range(ROWS))}).to_parquet(file)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Warm]:
    """The process that the commands of a page fork from, with the stand-ins in its cache of the hub."""
    hub = tmp_path_factory.mktemp("hf")
    for hub_id, base in STAND_INS.items():
        cached = hub / "hub" / f"models--{hub_id.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(COMMIT)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / COMMIT).symlink_to(BASES / base)
    with tempfile.TemporaryDirectory(prefix="warm") as folder:  # short, because the path of a socket must be
        process = Warm(Path(folder), {"HF_HOME": str(hub), "LORA_HF_DATA_DIR": str(shared / "data")})
        yield process
        process.close()


@pytest.fixture
def checkout(tmp_path: Path, shared: Path) -> Path:
    """What a reader has: a clone with scripts, configs and docs, next to the folder `shared`."""
    (tmp_path / "shared").symlink_to(shared)
    folder = tmp_path / "lora_hf"
    folder.mkdir()
    for name in ("scripts", "configs", "docs"):
        (folder / name).symlink_to(REPO / name)
    return folder


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=page_name)
def test_the_page_runs(page: Path, warm: Warm, checkout: Path) -> None:
    port = _free_port()
    with warm.session(checkout) as session:
        try:
            _run_hook(session, f"before_{page.stem.lower()}")
            for block in blocks(page):
                if block.not_run or block.language not in RUN:
                    continue
                if block.language == "python":
                    _run_python(session, block.text, str(block), block.line)
                else:
                    done = warm.shell(block.text, checkout, port)
                    log = f"{block} ended with {done.returncode}\n{block.text}\n{done.stdout}{_server_log(checkout)}"
                    assert done.returncode == 0, log
            _run_hook(session, f"after_{page.stem.lower()}")
        finally:
            _stop_server(checkout)


def _run_python(session: Session, text: str, name: str, line: int = 0) -> None:
    ran, output = session.run(text, name, line)
    assert ran, f"{name}\n{text}\n{output}"


def _run_hook(session: Session, name: str) -> None:
    if hasattr(page_hooks, name):
        _run_python(session, f"from tests.support.page_hooks import {name}\n{name}(globals())\n", name)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _server_log(checkout: Path) -> str:
    log = checkout / "server.log"
    return f"\nserver: {log.read_text(encoding='utf-8')}" if log.exists() else ""


def _stop_server(checkout: Path) -> None:
    if (checkout / "server.pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((checkout / "server.pid").read_text()), signal.SIGTERM)


def test_a_failing_block_is_detected(warm: Warm, checkout: Path) -> None:
    for text, code in (
        ("python scripts/eval.py --adapter nowhere", 2),
        ("lora-hf eval --adapter nowhere | cat", 2),
        ("python -c 'import sys; sys.exit(7)'", 7),
        ("python -m lora_hf.nowhere", 1),
        ("make test", 99),
        ("python -c 'print(1)'", 0),
    ):
        done = warm.shell(text, checkout, 0)
        assert done.returncode == code, done.stdout
    with warm.session(checkout) as session:
        assert session.run("one = 1\n", "first") == (True, "")
        ran, output = session.run("assert one == 2, 'two'\n", "second", line=6)
        assert not ran
        assert 'File "second", line 7' in output
        assert "AssertionError: two" in output
