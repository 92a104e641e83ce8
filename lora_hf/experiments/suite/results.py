"""Reads the results of the finished runs of a suite from their files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.records import RECORD_FILE, RunRecord, ScoreRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.experiments.suite.plan import SCORES_FILE, PlannedRun
from lora_hf.experiments.suite.published import compare_published, hub_id
from lora_hf.models.model_ids import BUNDLED

WEIGHTS = ("*.safetensors", "*.bin")
TEXT_METRIC = "BLEU"  # compares runs of a generation task
COPIED = (
    "seed", "method", "metrics", "majority", "best", "rows", "parameters", "timings", "throughput", "memory",
    "files", "warnings",
)  # fmt: skip


def run_result(run: PlannedRun) -> dict[str, Any]:
    """The entry of a finished run in a `SuiteRecord`.

    Raises:
        DataError: a record is damaged.
    """
    record = RunRecord.load(run.folder / RECORD_FILE)
    result = {
        "task": run.task,
        "configuration": run.configuration,
        "folder": run.name,
        "starts_from": run.needs,
        **{name: getattr(record, name) for name in COPIED},
        "threads": record.machine.get("threads"),
        "history": _evaluations(record),
    }
    if run.writes_texts:
        scored = ScoreRecord.load(run.folder / SCORES_FILE)
        return result | {
            "metric": TEXT_METRIC,
            "value": scored.metrics["all"][TEXT_METRIC],
            "majority_value": None,
            "texts": {"split": scored.split, "metrics": scored.metrics, "timings": scored.timings},
            "rows": record.rows | {scored.split: scored.inputs},
        }
    metric = get_task(run.task).best_metric

    def over_rows(scores: Mapping[str, Mapping[str, float]]) -> float:
        """The mean of the metric over the rows of all evaluation splits."""
        counts = {split: record.rows[split] for split in scores}
        return sum(scores[split][metric] * count for split, count in counts.items()) / sum(counts.values())

    values = {"value": over_rows(record.metrics), "majority_value": over_rows(record.majority)}
    return result | {"metric": metric, **values}


def compare_all(runs: Sequence[PlannedRun], results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The result of `compare_published` by task and configuration."""
    compared: dict[str, dict[str, Any]] = {}
    for run in runs:
        seeds = [each for each in results if (each["task"], each["configuration"]) == (run.task, run.configuration)]
        mean = statistics.fmean(result["value"] for result in seeds)
        found = compare_published(run.config, seeds[0]["rows"], mean, run.needs is not None)
        compared.setdefault(run.task, {})[run.configuration] = found
    return compared


def base_bytes(model: ModelConfig) -> int | None:
    """The size of the base's weight files: bundled, in a folder, or in the hub's cache. None if there are no files."""
    if model.init == "random":
        return None
    if model.name in BUNDLED:
        from lora_hf.models.load import BUNDLED_FOLDER

        folder = BUNDLED_FOLDER / model.name
    elif not (folder := Path(model.name)).is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(hub_id(model.name), "config.json", revision=model.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    # Many models on the hub have their weights in both formats; count one.
    sizes = ([file.stat().st_size for file in folder.glob(pattern)] for pattern in WEIGHTS)
    return next((sum(files) for files in sizes if files), None)


def _evaluations(record: RunRecord) -> list[dict[str, float]]:
    """The entries of the history that have scores, without the Trainer's other numbers."""
    entries = (
        {key: value for key, value in entry.items() if key in ("epoch", "step") or key.startswith("eval_")}
        for entry in record.history
    )
    return [entry for entry in entries if entry.keys() - {"epoch", "step"}]
