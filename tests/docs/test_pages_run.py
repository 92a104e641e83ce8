"""Runs every bash and Python block of README and docs, page by page and in order.

Nothing is downloaded. The package's small bases stand in for models of the hub, in the cache where transformers looks
for them, and rule-based rows stand in for the datasets, in the layout of a data folder. Translations have the blocks of
their English page (tests/docs/test_pages.py), so only English pages run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from datasets import Dataset

from lora_hf.core.child_process import package_environment
from lora_hf.data.synthetic import rule_restaurants, rule_sentiment
from lora_hf.data.tasks.glue import GLUE
from lora_hf.models.model_ids import HUB_IDS
from tests.support.pages import PAGES, REPO, RUN, blocks, page_name
from tests.support.run_page import run_in_folder, start_reader

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

pytestmark = [pytest.mark.full, pytest.mark.minutes]


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
def reader(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[ProcessPoolExecutor]:
    """A process that runs pages, with the stand-ins in its cache of the hub."""
    hub = tmp_path_factory.mktemp("hf")
    for hub_id, base in STAND_INS.items():
        cached = hub / "hub" / f"models--{hub_id.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(COMMIT)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / COMMIT).symlink_to(BASES / base)
    environment = package_environment() | {"HF_HOME": str(hub), "LORA_HF_DATA_DIR": str(shared / "data")}
    with start_reader(environment) as process:
        yield process


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
def test_the_page_runs(page: Path, checkout: Path, reader: ProcessPoolExecutor) -> None:
    reader.submit(run_in_folder, page, checkout).result()


@pytest.mark.parametrize(
    ("language", "text", "error"),
    [
        ("bash", "python scripts/eval.py --adapter nowhere", "exit code 2"),
        ("bash", "lora-hf eval --nothing", "exit code 2"),
        ("bash", "python scripts/eval.py --adapter nowhere | cat", "returned non-zero exit status 2"),
        ("bash", "make test", "a block that calls make needs a comment"),
        ("python", "one = 1\n\nassert one == 2, 'two'", "line 5, in <module>\n"),
    ],
)
def test_a_failing_block_is_detected(
    language: str, text: str, error: str, tmp_path: Path, checkout: Path, reader: ProcessPoolExecutor
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n```{language}\n{text}\n```\n")
    with pytest.raises(RuntimeError) as failed:
        reader.submit(run_in_folder, page, checkout).result()
    assert error in str(failed.value)
    assert "-- page.md:2\n" in str(failed.value)
