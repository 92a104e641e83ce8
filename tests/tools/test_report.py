from __future__ import annotations

import json
from pathlib import Path
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
    """All records, and the number of cases of each kind of damaged input."""
    contents = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.rglob("*.json"))}
    damaged = contents[RESULTS / "robustness" / "input.json"]
    return [*contents.values(), [len(cases) for cases in damaged["cases"].values()]]


@pytest.mark.full
@pytest.mark.parametrize(
    "page",
    # The numbers of config.md are the limits and defaults of the config, and no measurements.
    [page for page in PAGES if MARKER.search(page.read_text(encoding="utf-8")) and page.name != "config.md"],
    ids=lambda page: page.name,
)
def test_every_number_of_a_results_page_comes_from_a_record(page: Path, records: list[Any]) -> None:
    """A number of the text is in a record or in a table of the page, which the test above holds to the records."""
    text = page.read_text(encoding="utf-8")
    known = [*records, [match.group() for match in MARKER.finditer(text)]]
    text = MARKER.sub("", text)
    assert not unexplained(text, known)
    assert unexplained(f"{text}\nIt is 314,159.26 times as fast.", known) == ["314,159.26"]


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
