"""A custom task through every verb: train, eval, predict, merge, combine, compare, push."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_hf.adapters.push import push_adapter
from lora_hf.cli.main import main
from lora_hf.core.records import RunRecord
from lora_hf.data.tasks.registry import get_task

FAST = ["train.max_steps=6", "train.warmup_steps=1", "model.precision=fp32", "output.overwrite=true"]
NAMES = ("negative", "positive")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rows of rule-sentiment as somebody else's CSV, under other names and in another order of classes."""
    folder = tmp_path_factory.mktemp("own")
    for split, rows in get_task("rule-sentiment").load(None, ["train", "validation"]).items():
        lines = [f'"{row["sentence"]}",{NAMES[row["label"]]}' for row in rows.select(range(200))]  # type: ignore[index, call-overload]
        (folder / f"{split}.csv").write_text("\n".join(["review,tone", *lines]) + "\n")
    config = folder / "reviews.yaml"
    config.write_text(
        f"model: {{name: tiny-roberta}}\ntask: {{name: reviews, kind: classification, text_columns: review, "
        f"label_column: tone, label_names: [positive, negative], metric: macro_f1, data_dir: {folder}}}\n"
    )
    words = [*FAST, f"output.dir={folder}/runs"]
    assert main(["--config", str(config), *words, "output.name=first"], verb="train") == 0
    assert main(["--config", str(config), *words, "output.name=second", "train.seed=1"], verb="train") == 0
    return {"data": folder, "runs": folder / "runs", "adapter": folder / "runs/first/adapter"}


def answer(capsys: pytest.CaptureFixture[str], verb: str, *words: object) -> Any:
    capsys.readouterr()
    assert main([*map(str, words), "--json"], verb=verb) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_scores_and_predictions(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    record = RunRecord.load(trained["runs"] / "first" / "record.json")
    assert set(record.metrics["validation"]) == {"accuracy", "macro_f1", "matthews_correlation"}
    assert record.best["metric"] == "eval_validation_macro_f1"
    scored = answer(capsys, "eval", "--adapter", trained["adapter"], "--data-dir", trained["data"])
    assert scored["metrics"] == record.metrics
    (row,) = answer(capsys, "predict", "--adapter", trained["adapter"], "--text", "A fine film.")["predictions"]
    assert list(row["probabilities"]) == ["positive", "negative"]


def test_a_copied_adapter_needs_its_config(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained["adapter"], copy)
    assert main(["--adapter", str(copy), "--text", "A fine film."], verb="predict") == 2
    assert "was trained for 'reviews', which is no task of lora_hf" in capsys.readouterr().err
    shutil.copy(trained["runs"] / "first" / "config.yaml", copy)
    assert answer(capsys, "predict", "--adapter", copy, "--text", "A fine film.")["predictions"]


def test_merged_and_combined_adapters_know_the_task(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, mix = tmp_path / "merged", tmp_path / "mix"
    runs = trained["runs"]
    assert main(["--adapter", str(trained["adapter"]), "--output", str(merged)], verb="merge") == 0
    both = [word for name in ("first", "second") for word in ("--adapter", f"{runs / name / 'adapter'}=0.5")]
    assert main([*both, "--output", str(mix)], verb="combine") == 0
    for folder in (merged, mix):
        scored = answer(capsys, "eval", "--adapter", folder, "--data-dir", trained["data"])
        assert set(scored["metrics"]["validation"]) == {"accuracy", "macro_f1", "matthews_correlation"}


def test_runs_are_compared_and_the_card_is_true(trained: dict[str, Any], tmp_path: Path) -> None:
    assert main([str(trained["runs"]), "--output", str(tmp_path / "report")], verb="compare") == 0
    report = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert [each["task"] for each in report["tasks"]] == ["reviews"]
    card = push_adapter(trained["adapter"], "somebody/reviews", dry_run=True).card
    assert "Task `reviews`, data of its author's own" in card
    assert str(trained["data"]) not in card
    assert "made by rule" not in card


def test_runs_by_another_metric_are_left_out(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained["runs"] / "first", other, ignore=shutil.ignore_patterns("checkpoints"))
    for name in ("record.json", "config.yaml"):
        text = (other / name).read_text()
        assert "macro_f1" in text
        (other / name).write_text(
            text.replace('"metric": "macro_f1"', '"metric": "accuracy"').replace("metric: macro_f1", "metric: accuracy")
        )
    assert main([str(trained["runs"]), str(other), "--output", str(tmp_path / "report")], verb="compare") == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert "its task 'reviews' has other labels or another metric than that of" in report
    (task,) = json.loads((tmp_path / "report" / "comparison.json").read_text())["tasks"]
    assert "accuracy" not in task["metric"]


def test_custom_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"Greet person {number}.", "completion": f"Hello, person {number}."} for number in range(40)]
    for split, part in (("train", rows), ("validation", rows[:8])):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    config = tmp_path / "greetings.yaml"
    config.write_text(
        f"model: {{name: tiny-gpt2}}\ntask: {{name: greetings, kind: generation, data_dir: {tmp_path}}}\n"
        "generate: {max_new_tokens: 8}\n"
    )
    words = [*FAST, f"output.dir={tmp_path}", "output.name=run"]
    assert main(["--config", str(config), *words], verb="train") == 0
    (text,) = answer(capsys, "generate", "--adapter", tmp_path / "run/adapter", "--prompt", "Greet me.")["texts"]
    assert text["prompt"] == "Greet me."
