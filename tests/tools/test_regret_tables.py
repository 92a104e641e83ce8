"""The tables of LoRA against full fine-tuning: each setting at its best rate, by the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_hf.core.records import SweepRecord
from tools.tables.regret import by_batch_size, by_rank, draw, rate_ratios

LOSSES = {"full": {1e-4: 0.40, 1e-3: 0.69}, "all": {1e-4: 0.45, 1e-3: 0.38}, "q, v": {1e-4: 0.50, 1e-3: 0.43}}


def write(folder: Path, name: str, batch_size: int = 32, ranks: tuple[int, ...] = (4, 16)) -> None:
    method = "full" if name == "full" else "lora"
    values: list[dict[str, Any]] = [{"train.lr": rate} for rate in LOSSES[name]]
    if method == "lora":
        values = [{"lora.r": r, **each} for each in values for r in ranks]
    trials = [
        # The highest accuracy belongs to another trial than the lowest loss.
        {
            "number": number,
            "state": "complete",
            "values": each,
            "loss": LOSSES[name][each["train.lr"]] + each.get("lora.r", 0) / 1000,
            "score": LOSSES[name][each["train.lr"]],
        }
        for number, each in enumerate(values)
    ]
    trials.append({"number": len(trials), "state": "diverged", "values": {"train.lr": 1.0, "lora.r": 4}, "loss": None})
    config = {
        "train": {"method": method, "batch_size": batch_size, "max_steps": 6400 // batch_size},
        "lora": {"targets": name.split(", "), "r": 16},
    }
    record = SweepRecord(name, "sst2", "validation", "accuracy", True, config, [], 0, trials, trials[0])
    record.write(folder / f"{name.replace(', ', '')}-{batch_size}.json")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "regret"
    folder.mkdir()
    for name in LOSSES:
        write(folder, name)
    write(folder, "full", 128)
    write(folder, "all", 128, ranks=(16,))
    return tmp_path


def test_each_setting_stands_with_the_rate_of_its_lowest_loss(results: Path) -> None:
    rows = [line.split(" | ") for line in by_rank(results).splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [
        "full fine-tuning",
        "LoRA r=4 on all",
        "LoRA r=16 on all",
        "LoRA r=4 on q, v",
        "LoRA r=16 on q, v",
    ]
    assert rows[0][1:] == ["[0.400](results/regret/full-32.json)", "40.0", "1e-4 |"]
    assert rows[2][1:] == ["[0.396](results/regret/all-32.json)", "38.0", "1e-3 |"]


def test_batches_of_other_sizes_stand_beside_the_same_setting(results: Path) -> None:
    rows = [line.strip("| ").split(" | ")[:2] for line in by_batch_size(results).splitlines()[2:]]
    assert rows == [
        ["32", "full fine-tuning"],
        ["32", "LoRA r=16 on all"],
        ["128", "full fine-tuning"],
        ["128", "LoRA r=16 on all"],
    ]


def test_the_ratio_compares_equal_rows_and_batches(results: Path) -> None:
    assert rate_ratios(results).splitlines()[2:] == [
        "| LoRA on all | 3 | 10 | 10 | 10 |",
        "| LoRA on q, v | 2 | 10 | 10 | 10 |",
    ]


@pytest.mark.full
def test_the_pictures_are_drawn(results: Path) -> None:
    assert [path.name for path in draw(results)] == ["learning-rate.png", "rank.png"]
    assert all(path.stat().st_size > 10_000 for path in draw(results))
