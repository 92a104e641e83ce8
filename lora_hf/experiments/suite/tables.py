"""Renders the results of a suite as Markdown tables, from its record."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.errors import DataError
from lora_hf.core.formatting import minutes, percent, table
from lora_hf.core.records import SuiteRecord, record_files

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
Run = dict[str, Any]
Measure = Callable[[Run], float]


def scores(record: SuiteRecord) -> str:
    """The score of each task and configuration over its seeds, and the gap to the published score."""
    rows = []
    for task, name, runs in group_runs(record):
        values = [run["value"] for run in runs]
        majority, published = runs[0]["majority_value"], record.published[task][name]
        rows.append(
            [
                f"{task}, {metric_label(runs[0])}",
                name,
                percent(statistics.fmean(values)),
                f"{percent(min(values))} to {percent(max(values))}" if len(values) > 1 else "-",
                str(len(values)),
                "-" if majority is None else percent(majority),
                published.get("why_not")
                or f"{published['gap']:+.1f} ({published['score']:.1f}±{published['spread']:.1f})",
            ]
        )
    for name in record.configurations:
        average = glue_average(record, name)
        if average is not None:
            rows.append(["**GLUE average**", name, f"**{percent(average)}**", "-", "-", "-", "-"])
    head = ["task, metric", "configuration", "mean, %", "range, %", "seeds", "majority class, %", "gap to published"]
    return table(head, rows, text_columns=2)


def resources(record: SuiteRecord) -> str:
    """What a run of each task and configuration costs, as the mean over its seeds."""
    rows = [
        [
            task,
            name,
            f"{runs[0]['rows']['train']:,}",
            f"{runs[0]['parameters']['trainable']:,}",
            minutes(_mean(runs, lambda run: run["timings"]["train"] / run.get("together", 1))),
            minutes(_mean(runs, seconds)),
            f"{_mean(runs, lambda run: run['throughput']['samples'] * run.get('together', 1)):,.0f}",
            _megabytes(_mean(runs, peak_memory)),
            _megabytes(_mean(runs, file_bytes), 2),
        ]
        for task, name, runs in group_runs(record)
    ]
    head = ["task", "configuration", "training rows", "trainable parameters", "training", "whole run", "examples/s"]
    return table([*head, "peak memory, MB", "file, MB"], rows, text_columns=2)


def storage(record: SuiteRecord) -> str:
    """File sizes for all tasks: one base with an adapter per task, compared with one full model per task."""
    base = record.base["bytes"]
    rows = []
    for name in record.configurations:
        runs = _runs(record, name)
        if not runs or runs[0]["method"] == "full":
            continue
        tasks = {run["task"] for run in runs}
        full_runs = [run for run in record.runs if run["method"] == "full" and run["task"] in tasks]
        measured = {run["task"] for run in full_runs} == tasks
        full = sum(task_means(full_runs, file_bytes)) if measured else None if base is None else len(tasks) * base
        adapters = sum(task_means(runs, file_bytes))
        together = None if base is None else base + adapters
        rows.append(
            [
                name,
                str(len(tasks)),
                _megabytes(base, 1),
                _megabytes(adapters, 2),
                _megabytes(together, 1),
                _megabytes(full, 1) + ("" if measured or full is None else " (copies of the base)"),
                f"{full / together:.1f}x" if full and together else "-",
            ]
        )
    head = ["configuration", "tasks", "one base, MB", "all adapters, MB", "total, MB", "full models, MB", "smaller"]
    return table(head, rows)


def texts(record: SuiteRecord) -> str:
    """All scores of the generated texts by task, subset and configuration, as the mean over the seeds."""
    groups = [(task, name, runs) for task, name, runs in group_runs(record) if "texts" in runs[0]]
    metrics = list(dict.fromkeys(metric for *_, runs in groups for metric in runs[0]["texts"]["metrics"]["all"]))
    rows = []
    for task, name, runs in groups:
        for subset in runs[0]["texts"]["metrics"]:
            cells = []
            for metric in metrics:
                values = [run["texts"]["metrics"][subset].get(metric) for run in runs]
                cells.append("-" if None in values else f"{statistics.fmean(values):.4f}")
            rows.append([task if subset == "all" else f"{task}, {subset}", name, *cells])
    return table(["task", "configuration", *metrics], rows, text_columns=2)


def choice(record: SuiteRecord) -> str:
    """Scores and costs of each configuration, over the tasks that all of them have finished."""
    tasks, by_name = shared_runs(record)
    rows = [
        [
            name,
            percent(mean_score(runs)),
            f"{statistics.median(run['parameters']['trainable'] for run in runs):,.0f}",
            f"{sum(task_means(runs, seconds)) / 3600:.2f}",
            f"{sum(task_means(runs, lambda run: seconds(run) * (run['threads'] or 1))) / 3600:.2f}",
            _megabytes(max(map(peak_memory, runs))),
            _megabytes(sum(task_means(runs, file_bytes)), 2),
        ]
        for name, runs in by_name.items()
    ]
    head = ["configuration", f"mean score of {len(tasks)} tasks, %", "trainable parameters", "hours", "core-hours"]
    return table([*head, "peak memory, MB", "files, MB"], rows)


def guide(record: SuiteRecord) -> str:
    """The configuration with the best mean score, and what the others cost and lose, in sentences."""
    tasks, by_name = shared_runs(record)
    if len(by_name) < 2:
        raise DataError("a guide needs two configurations that have finished the same task")
    best = max(by_name, key=lambda name: mean_score(by_name[name]))
    best_runs = by_name.pop(best)
    lines = [f"Over {', '.join(tasks)} on `{record.base['name']}`, `{best}` has the best mean score."]
    for name, runs in by_name.items():
        behind = 100 * (mean_score(best_runs) - mean_score(runs))
        time, size = (
            sum(task_means(runs, measure)) / sum(task_means(best_runs, measure)) for measure in (seconds, file_bytes)
        )
        pairs = {task: (_of_task(runs, task), _of_task(best_runs, task)) for task in tasks}
        better = [task for task, (ours, theirs) in pairs.items() if mean_score(ours) > mean_score(theirs)]
        overlapping = [task for task, (ours, theirs) in pairs.items() if _overlap(ours, theirs)]
        lines.append(
            f"- `{name}` is {behind:.1f} points behind on average, takes {time:.2f} times as long, and its files are "
            f"{size:.3f} times as large. It is better on {', '.join(better) or 'no task'}; the seeds of both overlap "
            f"on {', '.join(overlapping) or 'no task'}."
        )
    return "\n".join(lines)


def group_runs(record: SuiteRecord) -> list[tuple[str, str, list[Run]]]:
    """The finished runs by task and configuration, in the order of the plan."""
    tasks = dict.fromkeys(task for tasks in record.configurations.values() for task in tasks)
    groups = [(task, name, _of_task(_runs(record, name), task)) for task in tasks for name in record.configurations]
    return [group for group in groups if group[2]]


def shared_runs(record: SuiteRecord) -> tuple[list[str], dict[str, list[Run]]]:
    """The tasks that every started configuration has finished, and the runs of these tasks by configuration."""
    by_name = {name: runs for name in record.configurations if (runs := _runs(record, name))}
    tasks = [
        task
        for task in dict.fromkeys(run["task"] for run in record.runs)
        if all(_of_task(runs, task) for runs in by_name.values())
    ]
    shared = {name: [run for run in runs if run["task"] in tasks] for name, runs in by_name.items()}
    return tasks, {name: runs for name, runs in shared.items() if runs}


def task_means(runs: Sequence[Run], measure: Measure) -> list[float]:
    """The mean over the seeds of each task, so that tasks with more seeds have no more weight."""
    return [_mean(_of_task(runs, task), measure) for task in dict.fromkeys(run["task"] for run in runs)]


def mean_score(runs: Sequence[Run]) -> float:
    return statistics.fmean(task_means(runs, lambda run: run["value"]))


def glue_average(record: SuiteRecord, configuration: str) -> float | None:
    """The mean score of the eight GLUE tasks, or None if one is missing."""
    runs = [run for run in _runs(record, configuration) if run["task"] in GLUE]
    return mean_score(runs) if {run["task"] for run in runs} == set(GLUE) else None


def metric_label(run: Run) -> str:
    return run["metric"].replace("_correlation", "").replace("_", " ")


def seconds(run: Run) -> float:
    """The time of the run, with generating and scoring texts. Runs that trained together share their time."""
    return run["timings"]["total"] / run.get("together", 1) + sum(run.get("texts", {}).get("timings", {}).values())


def peak_memory(run: Run) -> int:
    """Bytes: on the GPU, or of the process if there is no GPU."""
    return run["memory"].get("cuda") or run["memory"]["rss"]


def file_bytes(run: Run) -> int:
    return sum(run["files"].values())


def _runs(record: SuiteRecord, configuration: str) -> list[Run]:
    return [run for run in record.runs if run["configuration"] == configuration]


def _of_task(runs: Sequence[Run], task: str) -> list[Run]:
    return [run for run in runs if run["task"] == task]


def _mean(runs: Sequence[Run], measure: Measure) -> float:
    return statistics.fmean(map(measure, runs))


def _overlap(ours: Sequence[Run], theirs: Sequence[Run]) -> bool:
    low, high = (sorted(run["value"] for run in runs) for runs in (ours, theirs))
    return len(low) > 1 and len(high) > 1 and low[0] <= high[-1] and high[0] <= low[-1]


def _megabytes(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value / 1e6:,.{digits}f}"


def from_results(render: Callable[[SuiteRecord], str]) -> Callable[[Path], str]:
    """A function that renders every record in the folder `suite` of the results, each with a caption.

    It raises DataError if there is no record.
    """

    def render_all(results: Path) -> str:
        parts = []
        for file in record_files(results / "suite"):
            record = SuiteRecord.load(file)
            caption = f"`{record.base['name']}`, {len(record.runs)} of {record.planned} runs "
            parts.append(f"{caption}([record](results/suite/{file.name})):\n\n{render(record)}")
        return "\n\n".join(parts)

    return render_all
