"""What a run leaves behind: one JSON record that holds every number anybody may quote from it."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_hf.core.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Self

RECORD_FILE = "record.json"
RUN_CONFIG_FILE = "config.yaml"
MERGE_FILE = "merge.json"
COMBINE_FILE = "combine.json"
COMPARISON_FILE = "comparison.json"


class _Record:
    """A dataclass that is one JSON file."""

    kind: ClassVar[str]  # as a message names it

    def write(self, path: Path) -> Path:
        """Writes aside and renames, so that a record is whole or not there."""
        aside = path.with_name(f"{path.name}.part")
        aside.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")  # type: ignore[call-overload]
        aside.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a record file.

        Raises:
            DataError: it is missing, damaged, or not a record of this kind and version.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable record: {error}") from error
        entries = fields(cls)  # type: ignore[arg-type]
        known = {entry.name for entry in entries}
        needed = {entry.name for entry in entries if entry.default is MISSING and entry.default_factory is MISSING}
        if not isinstance(values, dict) or not needed <= values.keys() <= known:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise DataError(f"{path}: not {cls.kind}: expected the keys {sorted(known)}, found {found}")
        return cls(**values)


@dataclass
class RunRecord(_Record):
    """One fine-tuning run. Times are seconds, memory and sizes bytes, metrics fractions as the metric defines them."""

    kind = "a run record"
    task: str
    method: str
    model: str
    config: dict[str, Any]  # resolved: every default spelled out
    seed: int
    started: str  # ISO 8601, UTC
    parameters: dict[str, int] = field(default_factory=dict)  # total, trainable, lora, head
    sites: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)  # by split
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # by evaluation split, of the best checkpoint
    majority: dict[str, dict[str, float]] = field(default_factory=dict)  # the same, of always giving one answer
    best: dict[str, Any] = field(default_factory=dict)  # step, epoch, metric and value that chose the checkpoint
    history: list[dict[str, float]] = field(default_factory=list)  # what the Trainer logged, in order
    timings: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)  # of training: examples and steps a second
    memory: dict[str, int] = field(default_factory=dict)  # peaks: rss, and cuda where there is a GPU
    files: dict[str, int] = field(default_factory=dict)  # sizes
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0  # with a gradient beyond fp16: they count among all steps, and nothing was learned from them
    together: int = 1  # runs in the same batches, this one included: times, throughput and memory are those of all

    def save(self, folder: Path) -> Path:
        """Writes the `record.json` of a run folder."""
        return self.write(folder / RECORD_FILE)


@dataclass
class ScoreRecord(_Record):
    """The texts of a model for a split's inputs, scored. Times are seconds."""

    kind = "a record of scores"
    task: str
    model: str
    adapted: bool  # False: the bare base
    split: str
    inputs: int
    decoding: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]  # by subset, `all` first; None where a scorer cannot run here
    precision: str
    timings: dict[str, float] = field(default_factory=dict)  # generate, score
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class MergeRecord(_Record):
    """A model with its adapter merged: what it was made of, and how far its answers moved. Times are seconds.

    `config` holds the sections of a run's config that say how the merged model answers.
    """

    kind = "a record of a merge"
    task: str
    base: str
    adapter: str
    dtype: str
    config: dict[str, Any]
    drift: dict[str, float]  # max_abs, largest_logit, relative, tolerance; the logits of the probe are compared in fp32
    probe: dict[str, int]  # drawn and real rows, and the seed of the drawn ones
    files: dict[str, int] = field(default_factory=dict)  # sizes in bytes
    timings: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class CombineRecord(_Record):
    """An adapter that was combined from others, by which method, and how much of them its rank leaves out.

    `config` holds the sections of a run's config that say how the combined adapter answers.
    """

    kind = "a record of a combination"
    task: str
    base: str
    adapters: list[dict[str, Any]]  # folder and weight of each
    method: str
    density: float | None
    seed: int
    config: dict[str, Any]
    ranks: dict[str, int]  # by path
    errors: dict[str, float]  # by path: relative, in the Frobenius norm
    error: float  # the same over all paths
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class SuiteRecord(_Record):
    """Many tasks trained on one base, each in several configurations and with several seeds.

    Each run holds task, configuration, seed, folder, metric and value (of `metric` over all evaluation splits, or of
    the written texts) and what its `RunRecord` says of scores, parameters, times, memory and files. Units as there.
    """

    kind = "a record of a suite"
    base: dict[str, Any]  # name, and bytes of its weights; None where no file of them exists
    configurations: dict[str, dict[str, dict[str, Any]]]  # by name and task: resolved, without seed and output
    planned: int  # runs
    jobs: int  # runs at a time
    started: str  # ISO 8601, UTC
    rows: dict[str, dict[str, int]] = field(default_factory=dict)  # by task and split
    runs: list[dict[str, Any]] = field(default_factory=list)
    published: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # by task and configuration
    failures: dict[str, str] = field(default_factory=dict)  # by run folder: the end of what it said
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepRecord(_Record):
    """Many runs of one config, each with values of its own, and which did best on the development rows."""

    kind = "a record of a sweep"
    study: str
    task: str
    split: str
    metric: str  # of that split; the score of a trial
    greater_is_better: bool
    config: dict[str, Any]  # what the trials share
    space: list[str]  # what they vary, as typed
    seed: int  # of the sampler
    trials: list[dict[str, Any]]  # number, state, values, score, evaluations, seconds, record, error
    best: dict[str, Any]  # of the trials; empty where none is complete
    importance: dict[str, float] = field(default_factory=dict)  # of each key; they sum to 1
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class ComparisonRecord(_Record):
    """Runs side by side: every number of the report that is made from it. Units as in the records of the runs."""

    kind = "a record of a comparison"
    made: str  # ISO 8601, UTC
    runs: list[dict[str, Any]]  # folder, task, seed, and the key of its configuration
    left_out: list[dict[str, str]]  # what could not be read, and why
    tasks: list[dict[str, Any]]
    statistics: dict[str, Any]  # confidence, resamples, seed
    options: dict[str, Any] = field(default_factory=dict)  # as given: quality, price_per_hour, currency
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)


def record_files(folder: Path) -> list[Path]:
    """The records of a folder, by name.

    Raises:
        DataError: there are none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"{folder}: no records")
    return files


def read_json_record(file: Path) -> dict[str, Any]:
    """A record that has no class: what a benchmark or a program of the tests has measured.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable: {error}") from error


def describe_run(record: RunRecord) -> str:
    """A run in a few words: which base, which method, and for LoRA which rank and targets."""
    return f"{describe_base(record)}, {describe_method(record)}"


def describe_base(record: RunRecord) -> str:
    """The base of a run, with what is unusual about it."""
    model = record.config["model"]
    base = record.model + (" (random weights)" if model["init"] == "random" else "")
    return base + (f" in {model['precision']}" if model["precision"] != "fp32" else "")


def describe_method(record: RunRecord) -> str:
    """What a run trained."""
    if record.method != "lora":
        return "head only" if record.method == "head" else "full fine-tuning"
    lora = record.config["lora"]
    return f"LoRA r={lora['r']} on {', '.join(lora['targets'])}"
