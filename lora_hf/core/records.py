"""Records of runs and of what is made from them: each a dataclass in one JSON file.

Every number shown anywhere is read from a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_hf.core.atomic_io import write_json_atomic
from lora_hf.core.errors import DataError
from lora_hf.core.parsing import read_json

if TYPE_CHECKING:
    from typing_extensions import Self

RECORD_FILE = "record.json"
RUN_CONFIG_FILE = "config.yaml"
MERGE_FILE = "merge.json"
COMBINE_FILE = "combine.json"
EXPORT_FILE = "export.json"
COMPARISON_FILE = "comparison.json"


class _Record:
    """Base class of the dataclasses below."""

    kind: ClassVar[str]  # as error messages call it

    def write(self, path: Path) -> Path:
        write_json_atomic(path, asdict(self))  # type: ignore[call-overload]
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a record file.

        Raises:
            DataError: it is missing, damaged, or not a record of this kind and version.
        """
        values = read_json_record(path)
        entries = fields(cls)  # type: ignore[arg-type]
        known = {entry.name for entry in entries}
        required = {entry.name for entry in entries if entry.default is MISSING and entry.default_factory is MISSING}
        if not isinstance(values, dict) or not required <= values.keys() <= known:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise DataError(f"{path}: not {cls.kind}: expected the keys {sorted(known)}, found {found}")
        return cls(**values)


@dataclass
class RunRecord(_Record):
    """One fine-tuning run. Times are in seconds, memory and file sizes in bytes, metrics on their own scale."""

    kind = "a run record"
    task: str
    method: str
    model: str
    config: dict[str, Any]  # resolved: with all defaults
    seed: int
    started: str  # ISO 8601, UTC
    parameters: dict[str, int] = field(default_factory=dict)  # total, trainable, lora, head
    sites: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)  # by split
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # by evaluation split, at the best checkpoint
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)  # by split, see `data.metrics.evaluation`
    majority: dict[str, dict[str, float]] = field(default_factory=dict)  # the same, of the majority class everywhere
    best: dict[str, Any] = field(default_factory=dict)  # step, epoch, metric and value of the best checkpoint
    history: list[dict[str, float]] = field(default_factory=list)  # what the Trainer logged, in order
    timings: dict[str, float] = field(default_factory=dict)  # seconds: setup, train, score, total; cpu of the process
    throughput: dict[str, float] = field(default_factory=dict)  # of training, in examples and steps per second
    memory: dict[str, int] = field(default_factory=dict)  # peaks: rss, and cuda on a GPU
    estimate: dict[str, Any] = field(default_factory=dict)  # of time and memory, and measured / estimated
    files: dict[str, int] = field(default_factory=dict)  # sizes
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0  # of all steps, those without an update because a gradient overflowed in fp16

    def save(self, folder: Path) -> Path:
        return self.write(folder / RECORD_FILE)


@dataclass
class ScoreRecord(_Record):
    """Scores of the texts that a model generated for a split. Times are in seconds."""

    kind = "a record of scores"
    task: str
    model: str
    adapted: bool  # False: the base without an adapter
    split: str
    inputs: int
    decoding: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]  # by subset, `all` first; None if its scorer cannot run
    precision: str
    timings: dict[str, float] = field(default_factory=dict)  # generate, score
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class MergeRecord(_Record):
    """A merged model: its base and adapter, and how much merging changed the logits. Times are in seconds.

    `config` holds the sections of a run's config that inference needs.
    """

    kind = "a record of a merge"
    task: str
    base: str
    adapter: str
    dtype: str
    config: dict[str, Any]
    drift: dict[str, float]  # of the probe's logits in fp32; rounding: of the base alone
    probe: dict[str, int]  # numbers of random and real rows, and the seed of the random ones
    files: dict[str, int] = field(default_factory=dict)  # sizes in bytes
    timings: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class CombineRecord(_Record):
    """An adapter combined from others: the method, and the error of its low-rank approximation.

    `config` holds the sections of a run's config that inference needs.
    """

    kind = "a record of a combination"
    task: str
    base: str
    adapters: list[dict[str, Any]]  # folder and weight of each
    method: str
    density: float | None
    seed: int
    config: dict[str, Any]
    ranks: dict[str, int]  # by module path
    errors: dict[str, float]  # by module path: relative, in the Frobenius norm
    error: float  # the same over all modules
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class ExportRecord(_Record):
    """An adapter in the format of another program."""

    kind = "a record of an export"
    target: str
    base: str
    adapter: str
    files: dict[str, int]  # sizes in bytes
    notes: list[str]  # how to use it
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class SuiteRecord(_Record):
    """Many tasks trained on one base, each in several configurations and with several seeds.

    Each run has its task, configuration, seed, folder, metric and value (the mean of `metric` over the evaluation
    splits, or the score of the generated texts), and the scores, parameters, times, memory and file sizes of its
    `RunRecord`, in the same units.
    """

    kind = "a record of a suite"
    base: dict[str, Any]  # name, and bytes of its weights (None if there is no file)
    configurations: dict[str, dict[str, dict[str, Any]]]  # resolved, by name and task, without seed and output
    planned: int  # runs
    jobs: int  # parallel runs
    started: str  # ISO 8601, UTC
    rows: dict[str, dict[str, int]] = field(default_factory=dict)  # by task and split
    runs: list[dict[str, Any]] = field(default_factory=list)
    published: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # by task and configuration
    failures: dict[str, str] = field(default_factory=dict)  # by run folder: the end of its output
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepRecord(_Record):
    """Runs of one config with different values, and the best of them on an evaluation split."""

    kind = "a record of a sweep"
    study: str
    task: str
    split: str
    metric: str  # the score of a trial on `split`
    greater_is_better: bool
    config: dict[str, Any]  # the same in all trials
    space: list[str]  # what differs, as given
    seed: int  # of the sampler
    trials: list[dict[str, Any]]  # number, state, values, score, evaluations, loss, steps, times, record, error
    best: dict[str, Any]  # one of `trials`; empty if none is complete
    importance: dict[str, float] = field(default_factory=dict)  # by key, in total 1
    pruner: str = "median"  # what stopped trials early
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class ComparisonRecord(_Record):
    """Every number of a report that compares runs, in the units of their records."""

    kind = "a record of a comparison"
    made: str  # ISO 8601, UTC
    runs: list[dict[str, Any]]  # folder, task, seed and key of the configuration
    left_out: list[dict[str, str]]  # unreadable runs with the reason
    tasks: list[dict[str, Any]]
    statistics: dict[str, Any]  # confidence, resamples, seed
    options: dict[str, Any] = field(default_factory=dict)  # as given: quality, price_per_hour, currency
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)


def record_files(folder: Path) -> list[Path]:
    """Returns the records of a folder by name.

    Raises:
        DataError: there are none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"{folder}: no records")
    return files


def read_json_record(file: Path) -> Any:
    """Reads a record without checking its keys, such as that of a benchmark.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable record: {error}") from error


def peak_memory(memory: Mapping[str, int]) -> int:
    """Bytes of `RunRecord.memory`: of tensors on the GPU, or of the process if there is no GPU."""
    return memory.get("cuda") or memory["rss"]


def describe_run(record: RunRecord) -> str:
    """Returns base and method in a few words."""
    return f"{describe_base(record)}, {describe_method(record)}"


def describe_base(record: RunRecord) -> str:
    model = record.config["model"]
    base = record.model + (" (random weights)" if model["init"] == "random" else "")
    return base + (f" in {model['precision']}" if model["precision"] != "fp32" else "")


def describe_method(record: RunRecord) -> str:
    return method_label(record.method, record.config["lora"])


def method_label(method: str, lora: dict[str, Any]) -> str:
    """`train.method` in words, with rank and targets from the section `lora` of a config."""
    if method != "lora":
        return "head only" if method == "head" else "full fine-tuning"
    return f"LoRA r={lora['r']} on {', '.join(lora['targets'])}"
