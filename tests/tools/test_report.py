from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest

from lora_hf.core.errors import DataError
from tests.support.numbers_in_records import unexplained
from tools.report import MARKER, TABLES, fill, fill_pages

REPO = Path(__file__).parents[2]
RESULTS = REPO / "docs" / "results"
PAGES = [*sorted(REPO.glob("README*.md")), *sorted((REPO / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_of_the_pages_is_what_the_records_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text, "run: python -m tools.report"


@pytest.fixture(scope="module")
def records() -> list[Any]:
    """Every record; of a suite what its tables make of its runs, of a measured speed what they make of its sides; and
    how many cases of damaged input there are."""
    found = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.rglob("*.json"))}
    suites = [record for file, record in found.items() if file.parent.name == "suite"]
    speeds = [record for file, record in found.items() if file.parent.name == "speed"]
    damaged = json.loads((RESULTS / "robustness" / "input.json").read_text(encoding="utf-8"))
    cases = [len(cases) for cases in damaged["cases"].values()]
    return [*found.values(), *map(means_and_sums, suites), *map(full_against_lora, speeds), cases]


def full_against_lora(record: dict[str, Any]) -> list[float]:
    """How many times as much full fine-tuning multiplies as LoRA, how many times as long it takes, and their ratio."""
    sides = record["sides"]
    if "full" not in sides:
        return []
    work = sides["full"]["flops"] / sides["lora"]["flops"]
    ours, theirs = (
        median(slow / fast for slow, fast in zip(sides["full"]["seconds"], sides[side]["seconds"], strict=True))
        for side in ("lora", "peft-best")
    )
    return [work, ours, theirs, ours / work]


def means_and_sums(suite: dict[str, Any]) -> list[Any]:
    """By task and configuration the means over the seeds, their sums over the tasks, and the ratios of these."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for run in suite["runs"]:
        numbers = {
            f"{part}.{key}": value for part in ("timings", "throughput", "memory") for key, value in run[part].items()
        }
        numbers |= {"value": 100 * run["value"], "files": sum(run["files"].values())}
        runs.setdefault(run["configuration"], {}).setdefault(run["task"], []).append(numbers)
    means = {
        name: {task: {key: fmean(each[key] for each in seeds) for key in seeds[0]} for task, seeds in tasks.items()}
        for name, tasks in runs.items()
    }
    summed = ("timings.total", "files")
    sums = [{key: sum(task[key] for task in tasks.values()) for key in summed} for tasks in means.values()]
    ratios = [one[key] / other[key] for one in sums for other in sums for key in one]
    return [means, sums, ratios]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if MARKER.search(page.read_text(encoding="utf-8"))], ids=lambda page: page.name
)
def test_every_number_of_a_page_of_results_stands_in_a_record(page: Path, records: list[Any]) -> None:
    """Those of the sentences too; the tables are held to their own records by the test above."""
    text = page.read_text(encoding="utf-8")
    assert not unexplained(text, records)
    assert unexplained(f"{text}\nIt is 314,159.26 times as fast.", records) == ["314,159.26"]


def test_a_table_goes_between_its_markers_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TABLES, "one", lambda results: f"| 1 | {results.name} |")
    text = "before\n<!-- table: one -->\nold\n<!-- end -->\nafter\n"
    filled = fill(text, tmp_path / "results")
    assert filled == "before\n<!-- table: one -->\n| 1 | results |\n<!-- end -->\nafter\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("plain\n")
    (tmp_path / "docs" / "a.md").write_text(text)
    assert fill_pages(tmp_path) == [tmp_path / "docs" / "a.md"]
    assert fill_pages(tmp_path) == []


def test_an_unknown_table_and_missing_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no table 'nothing'; there are: "):
        fill("<!-- table: nothing -->\n<!-- end -->", tmp_path)
    with pytest.raises(DataError, match="sst2: no records"):
        fill("<!-- table: sst2 -->\n<!-- end -->", tmp_path)


def test_the_results_pages_have_tables_at_all() -> None:
    assert MARKER.search((REPO / "docs" / "results.md").read_text(encoding="utf-8"))
