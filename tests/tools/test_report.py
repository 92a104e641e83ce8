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
def test_the_tables_of_a_page_match_the_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text, "run: python -m tools.report"


@pytest.fixture(scope="module")
def records() -> list[Any]:
    """All records, with what the tables compute from the runs of a suite, from the sides of a speed benchmark, and from
    the cases of damaged input."""
    contents = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.rglob("*.json"))}
    suites = [record for file, record in contents.items() if file.parent.name == "suite"]
    speeds = [record for file, record in contents.items() if file.parent.name == "speed"]
    damaged = json.loads((RESULTS / "robustness" / "input.json").read_text(encoding="utf-8"))
    cases = [len(cases) for cases in damaged["cases"].values()]
    return [*contents.values(), *map(means_and_sums, suites), *map(full_over_lora, speeds), cases]


def full_over_lora(record: dict[str, Any]) -> list[float]:
    """Full fine-tuning relative to LoRA: the ratio of the FLOPs, of the times, and of these two ratios."""
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
    """For each configuration the means over seeds by task, their sums over tasks, and the ratios of these sums."""
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


@pytest.mark.full
@pytest.mark.parametrize(
    "page",
    # The numbers of config.md are the limits and defaults of the config, and no measurements.
    [page for page in PAGES if MARKER.search(page.read_text(encoding="utf-8")) and page.name != "config.md"],
    ids=lambda page: page.name,
)
def test_every_number_of_a_results_page_comes_from_a_record(page: Path, records: list[Any]) -> None:
    """Including the numbers in the text. The test above checks the tables."""
    text = page.read_text(encoding="utf-8")
    assert not unexplained(text, records)
    assert unexplained(f"{text}\nIt is 314,159.26 times as fast.", records) == ["314,159.26"]


def test_a_table_is_rendered_between_its_markers_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TABLES, "one", lambda results: f"| 1 | {results.name} |")
    text = "before\n<!-- table: one -->\nold\n<!-- end -->\nafter\n"
    filled = fill(text, tmp_path / "results")
    assert filled == "before\n<!-- table: one -->\n| 1 | results |\n<!-- end -->\nafter\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("plain\n")
    (tmp_path / "docs" / "a.md").write_text(text)
    assert fill_pages(tmp_path) == [tmp_path / "docs" / "a.md"]
    assert fill_pages(tmp_path) == []


def test_unknown_tables_and_missing_records_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'nothing'.*sst2"):
        fill("<!-- table: nothing -->\n<!-- end -->", tmp_path)
    with pytest.raises(DataError, match="sst2: no records"):
        fill("<!-- table: sst2 -->\n<!-- end -->", tmp_path)


def test_the_results_page_has_tables() -> None:
    assert MARKER.search((REPO / "docs" / "results.md").read_text(encoding="utf-8"))
