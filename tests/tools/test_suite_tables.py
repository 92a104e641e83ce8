from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lora_hf.core.errors import DataError
from lora_hf.core.records import SuiteRecord
from lora_hf.experiments.suite.tables import storage
from tests.support.suite_records import suite_record, suite_run, two_methods
from tools.report import fill
from tools.tables.suite import guide


def test_the_guide_says_who_is_ahead_and_what_is_too_close_to_tell() -> None:
    text = guide(two_methods())
    assert text.splitlines() == [
        "Over rte, sst2 on `tiny-roberta`, `full` has the highest mean score.",
        (
            "- `lora` scores 4.5 points lower on average, takes 0.55 times the CPU time, and its files are 0.050 times "
            "as large. It is too close to tell on rte, sst2."
        ),
    ]
    with pytest.raises(DataError, match="two configurations"):
        guide(suite_record([suite_run("rte", "lora", 0, 0.5)]))


@pytest.mark.parametrize(
    ("values", "more", "verdict"),
    [
        ((0.7, 0.6), {}, "It is better on rte; worse on sst2."),  # two standard errors of 277 rows: 0.080
        ((0.67, 0.6), {}, "It is worse on sst2; too close to tell on rte."),
        ((0.67, 0.6), {"rows": {"train": 9, "validation": 1000}}, "It is better on rte; worse on sst2."),
        ((0.67, 0.6), {"metric": "pearson"}, "It is worse on sst2; too close to tell on rte."),  # 0.102
        ((0.71, 0.6), {"metric": "pearson"}, "It is better on rte; worse on sst2."),
        ((0.71, 0.6), {"metric": "matthews_correlation"}, "It is better on rte; worse on sst2."),
        ((0.9, 0.6), {"metric": "f1"}, "It is worse on sst2; too close to tell on rte."),
    ],
)
def test_single_seeds_are_too_close_within_two_standard_errors(
    values: tuple[float, float], more: dict[str, Any], verdict: str
) -> None:
    runs = [suite_run("rte", name, 0, value, **more) for name, value in zip("ab", values, strict=True)]
    runs += [suite_run("sst2", "a", 0, 0.1), suite_run("sst2", "b", 0, 0.9)]  # so `b` is the best on average
    assert verdict in guide(suite_record(runs))


def test_a_page_gets_the_tables_from_the_files(tmp_path: Path) -> None:
    page = "<!-- table: glue-storage -->\n<!-- end -->"
    with pytest.raises(DataError, match="glue: no records"):
        fill(page, tmp_path)
    (tmp_path / "glue").mkdir()
    record = two_methods()
    file = record.write(tmp_path / "glue" / "tiny.json")
    assert asdict(SuiteRecord.load(file)) == asdict(record)
    filled = fill(page, tmp_path)
    assert "`tiny-roberta`, 6 of 6 runs ([record](results/glue/tiny.json)):\n\n" in filled
    assert storage(record) in filled
