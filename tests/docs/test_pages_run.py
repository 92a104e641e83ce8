"""Every block of bash and Python of README and docs runs, page by page, in order, as it stands there.

The hub's models are stood in for by the bases that come with the package, in the cache where the libraries look for
them; its data by rows made by rule, in the layout of a data folder. A page in Vietnamese has the blocks of its English
page (tests/docs/test_pages.py), so running those covers both.
"""

from __future__ import annotations

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
from tests.support import around
from tests.support.pages import PAGES, REPO, RUN, Block, blocks, page_name
from tests.support.warm import Warm

ROWS = 24
BASES = REPO / "lora_hf" / "models" / "bases"
STAND_INS = {
    **{HUB_IDS[name]: "tiny-roberta" for name in ("roberta-base", "roberta-large")},
    **{HUB_IDS[name]: "tiny-gpt2" for name in ("gpt2", "gpt2-medium", "gpt2-large")},
}
PAGES_THAT_RUN = [
    page
    for page in PAGES
    if not page.name.endswith(".vi.md") and any(b.language in RUN and not b.not_run for b in blocks(page))
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked, and their sockets are Linux's")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shared/data` and `shared/models` as the pages name them: every task with a few rows."""
    folder = tmp_path_factory.mktemp("shared")
    sentences = [row["sentence"] for row in rule_sentiment("train")[: 2 * ROWS]]
    for task in GLUE:
        texts = {column: sentences[place :: len(task.text_columns)] for place, column in enumerate(task.text_columns)}
        texts = {column: some[:ROWS] for column, some in texts.items()}
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
    """The process that the pages' commands fork from, with stand-ins in its cache of the hub."""
    hub = tmp_path_factory.mktemp("hf")
    for hub_id, base in STAND_INS.items():
        cached = hub / "hub" / f"models--{hub_id.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / ("0" * 40)).symlink_to(BASES / base)
    # A socket's path may not be long.
    with tempfile.TemporaryDirectory(prefix="warm") as folder:
        process = Warm(Path(folder), {"HF_HOME": str(hub), "LORA_HF_DATA_DIR": str(shared / "data")})
        yield process
        process.close()


@pytest.fixture
def place(tmp_path: Path, shared: Path) -> Path:
    """A checkout as a reader has it: scripts, configs and docs, and `../shared` beside it."""
    (tmp_path / "shared").symlink_to(shared)
    folder = tmp_path / "lora_hf"
    folder.mkdir()
    for name in ("scripts", "configs", "docs"):
        (folder / name).symlink_to(REPO / name)
    return folder


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=page_name)
def test_the_page_runs(page: Path, warm: Warm, place: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = page.stem.lower()
    with warm.session(place) as session:

        def python(text: str, what: str, line: int = 0) -> str:
            ran, said = session.run(text, what, line)
            assert ran, f"{what}\n{text}\n{said}"
            return said

        def beside(when: str) -> None:
            if hasattr(around, f"{when}_{name}"):
                call = f"{when}_{name}"
                python(f"from tests.support.around import {call}\n{call}(globals())\n", call)

        try:
            beside("before")
            for block in blocks(page):
                if block.not_run or block.language not in RUN:
                    continue
                if block.language == "python":
                    python(block.text, str(block), block.line)
                    continue
                done = warm.shell(block.text, place, port)
                said = f"{block} ended with {done.returncode}\n{block.text}\n{done.stdout}{_served(place)}"
                assert done.returncode == 0, said
            beside("after")
        finally:
            _stop_server(place)


def _served(place: Path) -> str:
    log = place / "server.log"
    return f"\nserver: {log.read_text(encoding='utf-8')}" if log.exists() else ""


def _stop_server(place: Path) -> None:
    if (place / "server.pid").exists():
        os.kill(int((place / "server.pid").read_text()), signal.SIGTERM)


def test_a_block_that_fails_is_seen(warm: Warm, place: Path) -> None:
    """The shell, the command and the session tell of a mistake; otherwise every page would pass."""
    for text, code in (
        ("python scripts/eval.py --adapter nowhere", 2),
        ("lora-hf eval --adapter nowhere | cat", 2),
        ("python -c 'import sys; sys.exit(7)'", 7),
        ("python -m lora_hf.nowhere", 1),
        ("make test", 99),
        ("python -c 'print(1)'", 0),
    ):
        done = warm.shell(text, place, 0)
        assert done.returncode == code, done.stdout
    with warm.session(place) as session:
        assert session.run("one = 1\n", "first") == (True, "")
        ran, said = session.run("assert one == 2, 'two'\n", "second", line=6)
        assert not ran
        assert 'File "second", line 7' in said
        assert "AssertionError: two" in said
    assert Block(place, 1, "bash", "").not_run is None
