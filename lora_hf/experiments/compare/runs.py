"""Reads finished runs from their folders; damaged files are reported and skipped."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import DataError, UserError
from lora_hf.core.parsing import parse_json
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, RunRecord, ScoreRecord, peak_memory
from lora_hf.data.metrics.classification import compute_metrics
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.classification import TextClassification
from lora_hf.data.tasks.registry import get_task, task_names, task_of

# The official metric of STS-B rounds to float32. Predictions of another run differ by far more.
SCORE_TOLERANCE = 1e-5
TRAINED_BYTES = 4  # per trainable parameter, and again for its gradient: fp32
ADAMW_BYTES = 8  # per trainable parameter: two moments in fp32
FROZEN_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions of a classifier on a split, both `(rows,)`: class ids, or scores of a regression."""

    labels: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class ScoredTexts:
    """Generated texts with their scores; `name` is the split, marked if the bare base generated them."""

    name: str
    record: ScoreRecord
    texts: list[dict[str, Any]]  # input, references, output


@dataclass(frozen=True)
class FinishedRun:
    """The contents of a run folder that a comparison uses."""

    folder: Path
    record: RunRecord
    task: Task
    predictions: dict[str, Predictions] = field(default_factory=dict)  # by split
    texts: list[ScoredTexts] = field(default_factory=list)

    @property
    def split(self) -> str:
        """The split that runs are compared on; it also selects the best checkpoint."""
        return self.task.evaluation_splits[0]

    @property
    def score(self) -> float:
        """The task's main metric on that split."""
        return self.record.metrics[self.split][self.task.best_metric]

    @property
    def curves(self) -> dict[str, Any]:
        """Training loss and score during training, as pairs of step and value."""
        name = f"eval_{self.split}_{self.task.best_metric}"
        history = self.record.history
        return {
            "seed": self.record.seed,
            "loss": [[entry["step"], entry["loss"]] for entry in history if {"step", "loss"} <= entry.keys()],
            "score": [[entry["step"], entry[name]] for entry in history if {"step", name} <= entry.keys()],
        }

    @property
    def best_evaluation(self) -> float:
        """The best score of all evaluations during training."""
        values = [value for _, value in self.curves["score"]] or [self.score]
        return max(values) if self.task.greater_is_better else min(values)

    def time_to(self, quality: float) -> float | None:
        """Seconds of training until the first evaluation with that score, or None if no evaluation reaches it.

        The record has the total training time, evaluations included; it is distributed evenly over the steps.
        """
        steps = max((entry.get("step", 0) for entry in self.record.history), default=0)
        reached = operator.ge if self.task.greater_is_better else operator.le
        times = (self.record.timings["train"] * step / steps for step, v in self.curves["score"] if reached(v, quality))
        return next(times, None)


LeftOut = list[dict[str, str]]  # path of a folder or file that is not compared, and the reason


def memory_parts(record: RunRecord) -> dict[str, int]:
    """The peak memory in bytes by part: computed from the number of parameters, and the remainder.

    Parts that are unknown, such as quantized weights or the state of other optimizers, count as remainder.
    """
    model, train = record.config["model"], record.config["train"]
    trained, frozen = record.parameters["trainable"], record.parameters["total"] - record.parameters["trainable"]
    parts = {
        "frozen weights": 0 if model["quantised"] else frozen * FROZEN_BYTES[model["precision"]],
        "trained weights": trained * TRAINED_BYTES,
        "gradients": trained * TRAINED_BYTES,
        "AdamW's moments": 0 if "optim" in train["hf"] else trained * ADAMW_BYTES,
    }
    return parts | {"activations, workspace, libraries": max(0, peak_memory(record.memory) - sum(parts.values()))}


def find_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], LeftOut]:
    """The runs in these folders, ordered by task, and what was left out.

    Args:
        paths: run folders, or folders that contain run folders.

    Raises:
        DataError: no run can be used; the message has the reason for each.
    """
    runs: list[FinishedRun] = []
    left_out: LeftOut = []
    folders = {folder.resolve(): folder for path in paths for folder in _run_folders(path, paths, left_out)}
    for folder in folders.values():
        with _skip_damaged(left_out, folder):
            run = _read_run(folder, left_out)
            # Custom tasks with the same name may differ between runs.
            for other in runs:
                if run.task.name == other.task.name and _definition(run.task) != _definition(other.task):
                    raise DataError(
                        f"{folder}: the task {run.task.name!r} has other labels or another metric than in "
                        f"{other.folder}; compare the two separately"
                    )
            runs.append(run)
    if not runs:
        reasons = "".join(f"\n  {each['path']}: {each['reason']}" for each in left_out)
        raise DataError(f"nothing to compare: expected run folders of `train`{reasons}")
    order = task_names()
    runs.sort(key=lambda run: (order.index(run.task.name) if run.task.name in order else len(order), run.task.name))
    return runs, left_out


def _definition(task: Task) -> tuple[object, ...]:
    return task.model_kind, task.problem_type, task.label_names, task.best_metric


def _run_folders(path: Path, paths: Sequence[Path], left_out: LeftOut) -> list[Path]:
    if _is_run(path):
        return [path]
    subfolders = sorted(folder for folder in path.glob("*") if folder.is_dir())
    runs = [folder for folder in subfolders if _is_run(folder)]
    # The trials of a sweep would outnumber the runs next to it.
    reason = "contains run folders, such as the trials of a sweep: pass this folder to compare them"
    others = [folder for folder in subfolders if folder not in [*runs, *paths]]
    left_out += [{"path": str(each), "reason": reason} for each in others if any(map(_is_run, each.glob("*/")))]
    if not runs:
        expected = f"neither a run folder (no {RECORD_FILE}) nor a folder of run folders"
        left_out.append({"path": str(path), "reason": expected if path.is_dir() else "no such folder"})
    return runs


def _is_run(folder: Path) -> bool:
    return (folder / RECORD_FILE).exists() or (folder / RUN_CONFIG_FILE).is_file()


@contextmanager
def _skip_damaged(left_out: LeftOut, folder: Path, consequence: str = "") -> Iterator[None]:
    try:
        yield
    except UserError as error:
        reason = str(error).removeprefix(f"{folder}: ").replace(f"{folder}/", "")
        left_out.append({"path": str(folder), "reason": reason + consequence})


def _read_run(folder: Path, left_out: LeftOut) -> FinishedRun:
    file = folder / RECORD_FILE
    if not file.exists():
        raise DataError(f"{folder}: no {RECORD_FILE}: the run is not finished")
    record = RunRecord.load(file)
    known = record.task in task_names()
    task = get_task(record.task) if known else task_of(RunConfig.from_dict(record.config, str(file)).task)
    _check_record(record, task, file)
    run = FinishedRun(folder, record, task)
    if isinstance(task, TextClassification) and task.problem_type != "multi_label_classification":
        for split in task.evaluation_splits:
            with _skip_damaged(left_out, folder, "; compared without it"):
                run.predictions[split] = _read_predictions(run, split)
    for path in sorted(folder.glob("scores-*.json")):
        with _skip_damaged(left_out, folder, "; compared without it"):
            run.texts.append(_read_texts(path))
    return run


def _check_record(record: RunRecord, task: Task, path: Path) -> None:
    """Checks everything that a comparison reads, and adds the defaults of keys that are newer than the record."""
    try:
        record.config = RunConfig.from_dict(record.config, str(path)).to_dict()
        numbers = [
            *(record.metrics[split][task.best_metric] for split in task.evaluation_splits),
            *(record.rows[split] for split in (task.train_split, *task.evaluation_splits)),
            *(record.parameters[key] for key in ("total", "trainable")),
            *(record.memory[key] for key in ("rss", "cuda")),
            record.timings["train"],
            record.throughput["samples"],
        ]
        for number in numbers:
            if isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"expected a number, found {number!r}")
        for values in (*record.history, record.files, record.machine):
            values.items()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: incomplete record: {type(error).__name__}: {error}") from error


def _read_predictions(run: FinishedRun, split: str) -> Predictions:
    path = run.folder / f"predictions-{split}.jsonl"
    rows = _read_lines(path)
    count = run.record.rows[split]
    try:
        if [row["row"] for row in rows] != list(range(count)):
            raise DataError(f"{path}: expected {count} rows, found {len(rows)}: the file is incomplete")
        found = Predictions(*(np.array([float(row[key]) for row in rows]) for key in ("label", "prediction")))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a file of predictions: {type(error).__name__}: {error}") from error
    recorded = run.record.metrics[split]
    computed = compute_metrics(list(recorded), found.labels, found.predicted)
    for name, value in recorded.items():
        if not abs(computed[name] - value) <= SCORE_TOLERANCE:
            raise DataError(
                f"{path}: {name} is {computed[name]:.6f} but {value:.6f} in {RECORD_FILE}: predictions of another run"
            )
    return found


def _read_texts(path: Path) -> ScoredTexts:
    record = ScoreRecord.load(path)
    name = path.stem.removeprefix("scores-")
    outputs = path.with_name(f"outputs-{name}.jsonl")
    texts = _read_lines(outputs)
    if not all(isinstance(text, dict) and {"input", "references", "output"} <= text.keys() for text in texts):
        raise DataError(f"{outputs}: expected input, references and output in each line")
    if len(texts) != record.inputs:
        raise DataError(f"{outputs}: expected {record.inputs} texts, found {len(texts)}: the file is incomplete")
    return ScoredTexts(name, record, texts)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [parse_json(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable: {error}") from error
