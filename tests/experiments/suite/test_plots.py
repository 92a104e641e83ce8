from __future__ import annotations

from pathlib import Path

from lora_hf.experiments.suite.plots import draw_suite
from tests.support.suite_records import suite_record, two_methods


def test_every_plot_is_drawn(tmp_path: Path) -> None:
    written = draw_suite(two_methods(), tmp_path)
    assert [file.name for file in written] == ["scores.png", "parameters.png", "time.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


def test_without_a_task_in_common_nothing_is_compared(tmp_path: Path) -> None:
    runs = [run for run in two_methods().runs if (run["method"] == "full") == (run["task"] == "sst2")]
    assert [file.name for file in draw_suite(suite_record(runs), tmp_path)] == ["scores.png"]
