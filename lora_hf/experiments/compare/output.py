"""The folder of a report: written whole, and put in the place of an earlier one."""

from __future__ import annotations

from pathlib import Path

from lora_hf.core.atomic_io import atomic_folder, check_output_folder
from lora_hf.core.records import COMPARISON_FILE, ComparisonRecord
from lora_hf.experiments.compare.page import page
from lora_hf.experiments.compare.plots import draw
from lora_hf.experiments.compare.sections import report


def check_report_folder(folder: Path) -> None:
    """Raises ConfigError where `folder` is in the way: not empty, and no earlier report."""
    check_output_folder(folder, COMPARISON_FILE, overwrite=_is_report(folder))


def write_report(record: ComparisonRecord, folder: Path) -> dict[str, Path]:
    """Writes record, pictures and pages into `folder`; returns the paths of record and pages.

    Raises:
        ConfigError: as `check_report_folder`; also a place where nothing can be written.
    """
    with atomic_folder(folder, COMPARISON_FILE, overwrite=_is_report(folder)) as aside:
        record.write(aside / COMPARISON_FILE)
        pictures = {task["task"]: draw(task, aside) for task in record.tasks}
        text = report(record, pictures)
        (aside / "report.md").write_text(text, encoding="utf-8")
        tasks = ", ".join(pictures)
        (aside / "report.html").write_text(page(text, f"Comparison of runs: {tasks}", aside), encoding="utf-8")
    files = {"record": COMPARISON_FILE, "report": "report.md", "page": "report.html"}
    return {name: folder / file for name, file in files.items()}


def _is_report(folder: Path) -> bool:
    return (folder / COMPARISON_FILE).is_file()
