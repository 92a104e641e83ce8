"""The verb on real runs: tiny ones, trained here, of several methods and seeds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.cli.main import main
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.records import ComparisonRecord, RunRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.experiments.compare.comparison import CompareOptions, compare
from lora_hf.experiments.compare.report import render_report
from lora_hf.inference.generate import Generator, evaluate_texts
from lora_hf.training.run import train
from tests.support.numbers_in_records import unexplained

pytestmark = pytest.mark.full

REPO = Path(__file__).parents[3]
EVALUATE = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
SHORT = {"max_steps": 8, "batch_size": 8, "warmup_steps": 0, "hf": EVALUATE}
Change = Callable[[dict[str, Any]], None]


def trained(folder: Path, name: str, task: str = "rule-sentiment", r: int = 4, **values: Any) -> Path:
    model = {"name": "tiny-gpt2" if task == "rule-restaurants" else "tiny-roberta", "precision": "fp32"}
    sections = {
        "model": model,
        "task": {"name": task, "max_length": 128},
        "lora": {"r": r, "lora_alpha": 8, "targets": ["q", "v"]},
        "train": {**SHORT, "lr": 5e-3, **values},
        "generate": {"max_new_tokens": 16},
        "output": {"dir": str(folder), "plots": False, "name": name},
    }
    config = RunConfig.from_dict(sections)
    whole = get_task(task).load(None, ("train", "validation"))
    # Texts of classified rows are looked up by their place, so these runs are scored on all of theirs.
    rows = {split: part.select(range(60)) for split, part in whole.items()} if task == "rule-restaurants" else whole
    return train(config, rows=rows).folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        trained(folder, f"lora-{seed}", seed=seed)
    trained(folder, "head", method="head")
    trained(folder, "full", method="full", lr=5e-4)
    return folder


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writers")
    rows = {"test": get_task("rule-restaurants").load(None, ["test"])["test"].select(range(60))}
    for r in (2, 4):
        run = trained(folder, f"r{r}", "rule-restaurants", r)
        saved = find_saved_model(run / "adapter")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", "")  # without Java: its scorers take long to start, and are null like this
            evaluate_texts(Generator.load(saved), saved, rows, True, lambda texts, total: texts)
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(runs, tmp_path / "runs")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def change(record: Path, how: Change) -> None:
    values = json.loads(record.read_text(encoding="utf-8"))
    how(values)
    record.write_text(json.dumps(values), encoding="utf-8")


def by_label(record: ComparisonRecord, label: str) -> dict[str, Any]:
    return next(row for row in record.tasks[0]["configurations"] if row["label"].startswith(label))


def test_every_number_of_the_report_stands_in_its_record(
    runs: Path, writers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--price-per-hour", "1.25", "--currency", "EUR", "--quality", "0.45", "--json"]
    assert main(["compare", str(runs), str(writers), "--output", str(tmp_path / "report"), *words]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = Path(said["report"]).read_text(encoding="utf-8")
    record = json.loads(Path(said["record"]).read_text(encoding="utf-8"))
    assert unexplained(text, [record]) == []
    for shown in (r"\*\*(0\.\d{3})\*\*", r"\| (0\.\d{3}) to 0\.\d", r"\| ([\d,]{6,}) \|", r"([\d.]+) EUR an"):
        found = re.search(shown, text)
        assert found, shown
        # Another number that was measured may be equal to a changed one by chance, not to each of nine.
        number = found[1]
        changed = [number[:-1] + str((int(number[-1]) + by) % 10) for by in range(1, 10)]
        altered = {each: text[: found.start(1)] + each + text[found.end(1) :] for each in changed}
        assert any(unexplained(other, [record]) == [each] for each, other in altered.items()), shown
    assert ComparisonRecord.load(Path(said["record"])).tasks == record["tasks"]
    assert said["runs"] == 6
    assert said["left_out"] == []
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures == {
        *(
            f"rule-sentiment-{kind}.png"
            for kind in ("curves", "parameters", "time", "memory", "confusion", "reliability")
        ),
        *(f"rule-restaurants-{kind}.png" for kind in ("curves", "parameters", "time", "memory")),
    }
    assert pictures == set(re.findall(r"\]\((.*?)\)", text))
    page = Path(said["page"]).read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(pictures)


def test_what_it_says_is_what_the_runs_recorded(runs: Path) -> None:
    found = compare([runs], CompareOptions(quality=0.0))
    (task,) = found.tasks
    rows = {row["label"]: row for row in task["configurations"]}
    assert rows.keys() == {"LoRA r=4 on q, v", "head only", "full fine-tuning"}
    assert [row["key"] for row in task["configurations"]] == ["A", "B", "C"]
    seeds = [RunRecord.load(runs / f"lora-{seed}" / "record.json") for seed in (0, 1)]
    lora = rows["LoRA r=4 on q, v"]
    scores = [record.metrics["validation"]["accuracy"] for record in seeds]
    assert lora["seeds"] == [0, 1]
    shown = lora["scores"]["validation"]["accuracy"]
    assert (shown["mean"], shown["min"], shown["max"]) == (pytest.approx(np.mean(scores)), min(scores), max(scores))
    assert shown["interval"][0] < shown["mean"] < shown["interval"][1]
    assert lora["parameters"] == seeds[0].parameters
    assert lora["checkpoint"] == seeds[0].files["adapter"]
    assert lora["time_to_quality"]["reached"] == 2
    assert lora["time_to_quality"]["seconds"] == pytest.approx(np.mean([r.timings["train"] for r in seeds]) / 2), (
        "the first of two evaluations has any quality"
    )
    assert sum(map(sum, lora["confusion"])) == 500
    means = [row["scores"]["validation"]["accuracy"]["mean"] for row in task["configurations"]]
    assert means == sorted(means, reverse=True)
    assert task["pairs"] == len(task["tests"]) == 3
    assert task["majority"] == seeds[0].majority


def test_disagreements_are_those_of_the_prediction_files(runs: Path) -> None:
    (task,) = compare([runs / "head", runs / "full"], CompareOptions()).tasks
    found = task["disagreements"]
    assert [side["key"] for side in found["between"]] == ["A", "B"]
    first, second = (lines(Path(side["folder"]) / "predictions-validation.jsonl") for side in found["between"])
    right = [[row["label"] == row["prediction"] for row in rows] for rows in (first, second)]
    only_first = [row for row, (a, b) in enumerate(zip(*right, strict=True)) if a and not b]
    assert found["counts"]["only_first"] == len(only_first)
    assert sum(found["counts"].values()) == 500
    assert [row["row"] for row in found["rows"]["only_first"]] == only_first[:10]
    sentences = get_task("rule-sentiment").load(None, ["validation"])["validation"]["sentence"]
    listed = [row for rows in found["rows"].values() for row in rows]
    assert listed
    assert all(row["texts"] == {"sentence": sentences[row["row"]]} for row in listed)


def test_texts_stand_beside_their_references(writers: Path) -> None:
    (task,) = compare([writers], CompareOptions()).tasks
    (found,) = task["written"]
    first, second = (lines(Path(side["folder"]) / "outputs-test.jsonl") for side in found["between"])
    differing = [(a, b) for a, b in zip(first, second, strict=True) if a["output"] != b["output"]]
    assert differing
    assert [row["outputs"] for row in found["rows"]] == [[a["output"], b["output"]] for a, b in differing[:10]]
    assert [row["references"] for row in found["rows"]] == [a["references"][:3] for a, _ in differing[:10]]
    assert found["same"] == len(first) - len(differing)
    assert task["metric"] == "perplexity"
    assert {row["text_scores"][0]["metrics"]["all"]["METEOR"] for row in task["configurations"]} == {None}
    best, other = (row["scores"]["validation"]["perplexity"]["mean"] for row in task["configurations"])
    assert best <= other, "less is better"
    assert task["tests"] == []


def test_damaged_records_are_named_and_left_out(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = copied / "head" / "record.json"
    half.write_text(half.read_text(encoding="utf-8")[:-50], encoding="utf-8")
    (copied / "full" / "record.json").unlink()
    change(copied / "lora-1" / "record.json", lambda values: values["metrics"].clear())
    predictions = copied / "lora-0" / "predictions-validation.jsonl"
    predictions.write_text(predictions.read_text(encoding="utf-8")[:-10], encoding="utf-8")
    output = tmp_path / "report"
    assert main(["compare", str(copied), str(tmp_path / "nowhere"), "--output", str(output)]) == 0
    said = capsys.readouterr().err
    for reason in (
        "head: record.json: not a readable record",
        "full: no record.json: the run is not finished",
        "lora-1: record.json: incomplete record: KeyError: 'validation'",
        "lora-0: predictions-validation.jsonl: not readable",
        "nowhere: no such folder",
    ):
        assert reason in said
    text = (output / "report.md").read_text(encoding="utf-8")
    assert text.count("compared without it") == 1
    assert "There are no intervals" in text
    assert [run["folder"] for run in ComparisonRecord.load(output / "comparison.json").runs] == [str(copied / "lora-0")]


def test_a_sweep_among_runs_is_told_of_and_read_where_it_is_named(copied: Path, tmp_path: Path) -> None:
    sweep = copied / "sweep"
    sweep.mkdir()
    (copied / "lora-1").rename(sweep / "trial-0")
    (sweep / "best").symlink_to("trial-0")
    (copied / "data").mkdir()
    found = compare([copied], CompareOptions())
    assert [each["path"] for each in found.left_out] == [str(sweep)]
    assert "contains run folders, such as the trials of a sweep" in found.left_out[0]["reason"]
    named = compare([copied, sweep], CompareOptions())
    assert named.left_out == []
    assert len(named.runs) == len(found.runs) + 1, "the link to the best trial is no run of its own"


def test_nothing_left_is_exit_code_2_and_nothing_written(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for record in copied.glob("*/record.json"):
        record.write_text("{", encoding="utf-8")
    assert main(["compare", str(copied), "--output", str(tmp_path / "report")]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert all(name in said for name in ("lora-0", "lora-1", "head", "full"))
    assert not (tmp_path / "report").exists()


def test_predictions_of_another_run_are_not_believed(copied: Path) -> None:
    path = copied / "full" / "predictions-validation.jsonl"
    rows = lines(path)
    rows[0]["prediction"] = 1 - rows[0]["prediction"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = compare([copied / "head", copied / "full"], CompareOptions())
    assert len(found.left_out) == 1
    assert "predictions of another run; compared without it" in found.left_out[0]["reason"]
    assert by_label(found, "full")["scores"]["validation"]["accuracy"]["interval"] is None
    assert by_label(found, "head")["scores"]["validation"]["accuracy"]["interval"]


def other_threads(values: dict[str, Any]) -> None:
    values["machine"]["threads"] += 6


def other_recipe(values: dict[str, Any]) -> None:
    values["config"]["train"]["batch_size"] = 4


def other_rows(values: dict[str, Any]) -> None:
    values["rows"]["train"] = 7


@pytest.mark.parametrize(
    ("how", "aspect", "words"),
    [
        (other_threads, "machine", r"threads \d+, not \d+"),
        (other_recipe, "recipe", "batch_size 4, not 8"),
        (other_rows, "data", "train rows 7, not 2000"),
    ],
)
def test_what_is_not_comparable_is_marked(how: Change, aspect: str, words: str, copied: Path) -> None:
    change(copied / "full" / "record.json", how)
    found = compare([copied], CompareOptions())
    full, head = by_label(found, "full"), by_label(found, "head")
    assert full["differs"].keys() == {aspect}
    assert re.fullmatch(words, full["differs"][aspect])
    assert not full["front_time"]
    assert head["differs"] == {}
    others_data = aspect == "data"
    assert len(found.tasks[0]["tests"]) == (1 if others_data else 3)
    text = render_report(found, {})
    assert f"{full['key']} (full fine-tuning): {aspect}: " in text
    cells = next(line for line in text.splitlines() if "full fine-tuning †" in line).split(" | ")
    assert f"({full['examples_per_second']['mean']:.1f})" in cells
    assert cells[3].startswith("(") == others_data


def test_seeds_on_different_machines_are_two_rows(copied: Path) -> None:
    change(copied / "lora-1" / "record.json", other_threads)
    labels = [row["label"] for row in compare([copied], CompareOptions()).tasks[0]["configurations"]]
    assert len(labels) == 4
    assert sum(bool(re.fullmatch(r"LoRA r=4 on q, v, threads=\d+", label)) for label in labels) == 2


def test_rows_whose_texts_are_not_to_be_had_are_given_by_number(copied: Path, data_dir: Path) -> None:
    for name in ("head", "full"):  # the same files, said to be of a task whose rows they are not
        change(copied / name / "record.json", lambda values: values.update(task="sst2"))
    (task,) = compare([copied / "head", copied / "full"], CompareOptions(data_dir=str(data_dir))).tasks
    found = task["disagreements"]
    assert "other labels than those the runs were scored on" in found["without_texts"]
    assert all(row["texts"] == {} for rows in found["rows"].values() for row in rows)


def test_only_an_earlier_report_is_replaced(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report"
    words = ["compare", str(runs / "head"), "--output", str(output)]
    assert main(words) == 0
    assert main(words) == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert main([*words[:-1], str(tmp_path / "notes")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"report", "notes"}


def test_a_price_needs_its_currency(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(runs), "--output", str(tmp_path / "report"), "--price-per-hour"]
    assert main([*words, "1"]) == 2
    assert main([*words, "-1", "--currency", "EUR"]) == 2
    assert "expected a number >= 0, found -1" in capsys.readouterr().err


def test_torch_is_never_loaded(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from lora_hf.cli.main import main; status = main();"
        "assert not {'torch', 'transformers', 'evaluate'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", str(runs), "--output", str(tmp_path / "report")],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr
    (task,) = ComparisonRecord.load(tmp_path / "report" / "comparison.json").tasks
    compared = sum(row["same_data"] for row in task["configurations"])
    assert compared > 1
    assert f"rule-sentiment, the best of {compared}: accuracy 0." in done.stdout
