from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from lora_hf.core.errors import DataError
from lora_hf.core.records import SuiteRecord
from lora_hf.experiments.suite.tables import storage
from tests.support.suite_records import suite_record, suite_run, two_methods
from tools.report import fill
from tools.tables.suite import guide


def test_the_guide_says_who_is_ahead_and_where_seeds_overlap() -> None:
    text = guide(two_methods())
    assert text.splitlines() == [
        "Over rte, sst2 on `tiny-roberta`, `full` has the best mean score.",
        (
            "- `lora` is 4.5 points behind on average, takes 0.55 times the CPU time, and its files are 0.050 times as "
            "large. It is better on sst2; the seeds of both overlap on rte."
        ),
    ]
    with pytest.raises(DataError, match="two configurations"):
        guide(suite_record([suite_run("rte", "lora", 0, 0.5)]))


def test_a_page_gets_the_tables_from_the_files(tmp_path: Path) -> None:
    page = "<!-- table: suite-storage -->\n<!-- end -->"
    with pytest.raises(DataError, match="suite: no records"):
        fill(page, tmp_path)
    (tmp_path / "suite").mkdir()
    record = two_methods()
    file = record.write(tmp_path / "suite" / "tiny.json")
    assert asdict(SuiteRecord.load(file)) == asdict(record)
    filled = fill(page, tmp_path)
    assert "`tiny-roberta`, 6 of 6 runs ([record](results/suite/tiny.json)):\n\n" in filled
    assert storage(record) in filled
