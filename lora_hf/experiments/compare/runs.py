"""The run folders that are given to `compare`, read; what is damaged is named and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import DataError, UserError
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, RunRecord, ScoreRecord
from lora_hf.data.tasks.base import Task, TextClassification
from lora_hf.data.tasks.registry import get_task, task_names, task_of
from lora_hf.experiments.compare.statistics import scores

# STS-B's official metric rounds its inputs to float32; the predictions of another run are off by far more.
SAME_SCORE = 1e-5


@dataclass(frozen=True)
class Answers:
    """What a classifier answered on a split: labels and predictions, both (rows,); class ids, or scores."""

    labels: np.ndarray
    predictions: np.ndarray


@dataclass(frozen=True)
class WrittenText:
    """What a run wrote for an input of a split, and what people wrote."""

    input: str
    references: list[str]
    output: str


@dataclass(frozen=True)
class TextScores:
    """Texts of a split that were scored; `name` is the split, and for the bare base says so."""

    name: str
    record: ScoreRecord
    texts: list[WrittenText]


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with all that it holds for a comparison."""

    folder: Path
    record: RunRecord
    task: Task
    answers: dict[str, Answers] = field(default_factory=dict)  # by split
    texts: list[TextScores] = field(default_factory=list)

    @property
    def split(self) -> str:
        """The split that chose the checkpoint, which is the one that runs are compared on."""
        return self.task.evaluation_splits[0]

    @property
    def score(self) -> float:
        """The task's own metric there."""
        return self.record.metrics[self.split][self.task.best_metric]


@dataclass(frozen=True)
class LeftOut:
    """Something that could not be used, and why."""

    path: str
    reason: str


def find_runs(places: Sequence[Path]) -> tuple[list[FinishedRun], list[LeftOut]]:
    """The runs in these folders, by task in the order of the tasks' table, and what was left out.

    A place is a run folder, or a folder of run folders.

    Raises:
        DataError: no run can be used; the message says why of each.
    """
    runs: list[FinishedRun] = []
    left_out: list[LeftOut] = []
    folders = {folder.resolve(): folder for place in places for folder in _run_folders(place, places, left_out)}
    for folder in folders.values():
        _try(left_out, folder, lambda folder=folder: runs.append(_fitting(_read_run(folder, left_out), runs)))
    if not runs:
        reasons = "".join(f"\n  {each.path}: {each.reason}" for each in left_out)
        raise DataError(f"nothing to compare: expected folders that `train` wrote{reasons}")
    order = task_names()
    runs.sort(key=lambda run: (order.index(run.task.name) if run.task.name in order else len(order), run.task.name))
    return runs, left_out


def _fitting(run: FinishedRun, earlier: Sequence[FinishedRun]) -> FinishedRun:
    """The run itself; refuses one whose task is another than that of an earlier run under the same name."""
    for other in earlier:
        if other.task.name == run.task.name and _meaning(other.task) != _meaning(run.task):
            raise DataError(
                f"{run.folder}: its task {run.task.name!r} has other labels or another metric than that of "
                f"{other.folder}; compare the two apart"
            )
    return run


def _meaning(task: Task) -> tuple[object, ...]:
    return task.model_kind, task.problem_type, task.label_names, task.best_metric


def _run_folders(place: Path, places: Sequence[Path], left_out: list[LeftOut]) -> list[Path]:
    if not place.is_dir():
        left_out.append(LeftOut(str(place), "no such folder"))
        return []
    if _is_run(place):
        return [place]
    folders = sorted(folder for folder in place.iterdir() if folder.is_dir())
    inner = [folder for folder in folders if _is_run(folder)]
    # The trials of a sweep would drown the runs that lie beside it.
    left_out += [
        LeftOut(str(folder), "a sweep or another folder of run folders: not read; name it to compare them")
        for folder in folders
        if folder not in [*inner, *places] and any(map(_is_run, folder.glob("*/")))
    ]
    if not inner:
        left_out.append(LeftOut(str(place), f"neither a run folder (no {RECORD_FILE}) nor a folder of run folders"))
    return inner


def _is_run(folder: Path) -> bool:
    return (folder / RECORD_FILE).exists() or (folder / RUN_CONFIG_FILE).is_file()


def _read_run(folder: Path, left_out: list[LeftOut]) -> FinishedRun:
    if not (folder / RECORD_FILE).exists():
        raise DataError(f"{folder}: no {RECORD_FILE}: the run is not finished")
    record = RunRecord.load(folder / RECORD_FILE)
    task = _task(record, folder / RECORD_FILE)
    _check(record, task, folder / RECORD_FILE)
    run = FinishedRun(folder, record, task)
    for split in task.evaluation_splits:
        _try(left_out, folder, lambda split=split: _read_answers(run, split), "; compared without it")
    for path in sorted(folder.glob("scores-*.json")):
        _try(left_out, folder, lambda path=path: _read_texts(run, path), "; compared without it")
    return run


def _task(record: RunRecord, path: Path) -> Task:
    if record.task in task_names():
        return get_task(record.task)
    return task_of(RunConfig.from_dict(record.config, str(path)).task)


def _try(left_out: list[LeftOut], folder: Path, read: Callable[[], None], consequence: str = "") -> None:
    """Reads a run or a part of one; what is damaged goes on the list, in a message that need not repeat the folder."""
    try:
        read()
    except UserError as error:
        reason = str(error).removeprefix(f"{folder}: ").replace(f"{folder}/", "")
        left_out.append(LeftOut(str(folder), reason + consequence))


def _check(record: RunRecord, task: Task, path: Path) -> None:
    """Refuses a record that lacks what a comparison is made of, and spells out defaults that are newer than it."""
    try:
        record.config = RunConfig.from_dict(record.config, str(path)).to_dict()
        for split in task.evaluation_splits:
            _number(record.metrics[split][task.best_metric])
        for numbers, keys in (
            (record.parameters, ("total", "trainable")),
            (record.timings, ("train",)),
            (record.throughput, ("samples",)),
            (record.memory, ("rss", "cuda")),
            (record.rows, (task.train_split, *task.evaluation_splits)),
        ):
            for key in keys:
                _number(numbers[key])
        for numbers in (*record.history, record.files, record.machine):
            numbers.items()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a whole record: {type(error).__name__}: {error}") from error


def _number(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, found {value!r}")


def _read_answers(run: FinishedRun, split: str) -> None:
    path = run.folder / f"predictions-{split}.jsonl"
    if not isinstance(run.task, TextClassification):
        return
    rows = _lines(path)
    try:
        if [row["row"] for row in rows] != list(range(run.record.rows[split])):
            raise DataError(f"{path}: {len(rows)} rows, and the split has {run.record.rows[split]}: half-written")
        answers = Answers(*(np.array([float(row[key]) for row in rows]) for key in ("label", "prediction")))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not what train writes: {type(error).__name__}: {error}") from error
    recorded = run.record.metrics[split]
    found = scores(list(recorded), answers.labels, answers.predictions)
    for name, value in recorded.items():
        if not abs(found[name] - value) <= SAME_SCORE:
            raise DataError(f"{path}: their {name} is {found[name]:.6f}, the record says {value:.6f}: of another run")
    run.answers[split] = answers


def _read_texts(run: FinishedRun, path: Path) -> None:
    record = ScoreRecord.load(path)
    name = path.stem.removeprefix("scores-")
    outputs = path.with_name(f"outputs-{name}.jsonl")
    try:
        texts = [WrittenText(row["input"], row["references"], row["output"]) for row in _lines(outputs)]
    except (KeyError, TypeError) as error:
        raise DataError(f"{outputs}: not what eval writes: {type(error).__name__}: {error}") from error
    if len(texts) != record.inputs:
        raise DataError(f"{outputs}: {len(texts)} texts, and {path.name} scored {record.inputs}: half-written")
    run.texts.append(TextScores(name, record, texts))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable: {error}") from error
