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
from lora_hf.models.model_ids import EMBEDDED

WEIGHTS = ("*.safetensors", "*.bin")
TEXT_METRIC = "BLEU"  # compares runs of a generation task


def run_result(run: PlannedRun) -> dict[str, Any]:
    """The entry of a finished run in a `SuiteRecord`.

    Raises:
        DataError: a record is damaged.
    """
    record = RunRecord.load(run.folder / RECORD_FILE)
    metric, value, majority = _score(run, record)
    result = {
        "task": run.task,
        "configuration": run.configuration,
        "seed": record.seed,
        "folder": run.name,
        "starts_from": run.needs,
        "method": record.method,
        "metric": metric,
        "value": value,
        "majority_value": majority,
        "metrics": record.metrics,
        "majority": record.majority,
        "best": record.best,
        "rows": record.rows,
        "parameters": record.parameters,
        "timings": record.timings,
        "throughput": record.throughput,
        "memory": record.memory,
        "threads": record.machine.get("threads"),
        "together": record.together,
        "files": record.files,
        "warnings": record.warnings,
        "history": _evaluations(record),
    }
    if run.writes_texts:
        scored = ScoreRecord.load(run.folder / SCORES_FILE)
        result["texts"] = {"split": scored.split, "metrics": scored.metrics, "timings": scored.timings}
        result["rows"] = record.rows | {scored.split: scored.inputs}
    return result


def compare_all(runs: Sequence[PlannedRun], results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The result of `compare_published` by task and configuration."""
    compared: dict[str, dict[str, Any]] = {}
    for run in runs:
        seeds = [each for each in results if (each["task"], each["configuration"]) == (run.task, run.configuration)]
        mean = statistics.fmean(result["value"] for result in seeds)
        compared.setdefault(run.task, {})[run.configuration] = compare_published(
            run.config, seeds[0]["rows"], mean, run.needs is not None
        )
    return compared


def base_bytes(model: ModelConfig) -> int | None:
    """The size of the base's weight files: embedded, in a folder, or in the hub's cache. None if there are no files."""
    folder = None if model.init == "random" else _base_folder(model)
    if folder is None:
        return None
    # Many models on the hub have their weights in both formats; count one.
    sizes = ([file.stat().st_size for file in folder.glob(pattern)] for pattern in WEIGHTS)
    return next((sum(files) for files in sizes if files), None)


def _base_folder(model: ModelConfig) -> Path | None:
    if model.name in EMBEDDED:
        from lora_hf.models.load import EMBEDDED_FOLDER

        return EMBEDDED_FOLDER / model.name
    if Path(model.name).is_dir():
        return Path(model.name)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id(model.name), "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _score(run: PlannedRun, record: RunRecord) -> tuple[str, float, float | None]:
    """The metric, the run's value, and the value of always predicting the majority class, over all evaluation rows."""
    if run.writes_texts:
        scores = ScoreRecord.load(run.folder / SCORES_FILE).metrics["all"]
        value = scores[TEXT_METRIC]
        assert value is not None  # BLEU needs no external program
        return TEXT_METRIC, value, None
    metric = get_task(run.task).best_metric

    def over_rows(scores: Mapping[str, Mapping[str, float]]) -> float:
        counts = {split: record.rows[split] for split in scores}
        return sum(scores[split][metric] * count for split, count in counts.items()) / sum(counts.values())

    return metric, over_rows(record.metrics), over_rows(record.majority)


def _evaluations(record: RunRecord) -> list[dict[str, float]]:
    entries = [
        {key: value for key, value in entry.items() if key in ("epoch", "step") or key.startswith("eval_")}
        for entry in record.history
    ]
    return [entry for entry in entries if entry.keys() - {"epoch", "step"}]
