"""The tables of what `benchmark glue` and `benchmark nlg` measured, rendered from the record of a suite."""

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


def scores(record: SuiteRecord) -> str:
    """A row for each task and configuration: the score over its seeds, and against the published one."""
    rows = []
    for task, name, runs in groups(record):
        values = [run["value"] for run in runs]
        majority = runs[0]["majority_value"]
        rows.append(
            [
                f"{task}, {metric_words(runs[0])}",
                name,
                percent(statistics.fmean(values)),
                f"{percent(min(values))} to {percent(max(values))}" if len(values) > 1 else "-",
                str(len(values)),
                "-" if majority is None else percent(majority),
                _gap(record.published[task][name]),
            ]
        )
    for name in record.configurations:
        average = glue_average(record, name)
        if average is not None:
            rows.append(["**GLUE average**", name, f"**{percent(average)}**", "-", "-", "-", "-"])
    head = ["task, metric", "configuration", "mean, %", "lowest to highest", "seeds", "one answer, %"]
    return table([*head, "against published"], rows, text_columns=2)


def resources(record: SuiteRecord) -> str:
    """A row for each task and configuration: what a run cost, the mean over its seeds."""
    rows = []
    for task, name, runs in groups(record):
        rows.append(
            [
                task,
                name,
                f"{runs[0]['rows']['train']:,}",
                f"{runs[0]['parameters']['trainable']:,}",
                minutes(_mean(runs, lambda run: run["timings"]["train"] / run.get("together", 1))),
                minutes(_mean(runs, seconds_of)),
                f"{_mean(runs, lambda run: run['throughput']['samples'] * run.get('together', 1)):,.0f}",
                _megabytes(_mean(runs, memory_of)),
                _megabytes(_mean(runs, bytes_of), 2),
            ]
        )
    head = ["task", "configuration", "training rows", "trained parameters", "training", "whole run", "examples/s"]
    return table([*head, "peak memory, MB", "file, MB"], rows, text_columns=2)


def storage(record: SuiteRecord) -> str:
    """The files of n tasks: a base with n adapters against n full models."""
    rows = []
    for name in record.configurations:
        own = _of(record, name)
        tasks = dict.fromkeys(run["task"] for run in own)
        if not own or own[0]["method"] == "full":
            continue
        adapters = _sum_of_tasks(own, bytes_of)
        full, from_runs = _full_models(record, list(tasks))
        base = record.base["bytes"]
        together = None if base is None else base + adapters
        rows.append(
            [
                name,
                str(len(tasks)),
                "-" if base is None else _megabytes(base, 1),
                _megabytes(adapters, 2),
                "-" if together is None else _megabytes(together, 1),
                "-" if full is None else _megabytes(full, 1) + ("" if from_runs else " (copies of the base)"),
                "-" if full is None or together is None else f"{full / together:.1f}x",
            ]
        )
    head = ["configuration", "tasks", "one base, MB", "all adapters, MB", "together, MB", "full models, MB"]
    return table([*head, "smaller"], rows)


def texts(record: SuiteRecord) -> str:
    """A row for each generation task, subset and configuration: all official scores, the mean over the seeds."""
    written = [(task, name, runs) for task, name, runs in groups(record) if "texts" in runs[0]]
    metrics = list(dict.fromkeys(metric for *_, runs in written for metric in runs[0]["texts"]["metrics"]["all"]))
    rows = []
    for task, name, runs in written:
        for subset in runs[0]["texts"]["metrics"]:
            of_runs = [run["texts"]["metrics"][subset] for run in runs]
            cells = []
            for metric in metrics:
                values = [found[metric] for found in of_runs if found.get(metric) is not None]
                cells.append(f"{statistics.fmean(values):.4f}" if len(values) == len(of_runs) else "-")
            rows.append([task if subset == "all" else f"{task}, {subset}", name, *cells])
    return table(["task", "configuration", *metrics], rows, text_columns=2)


def choice(record: SuiteRecord) -> str:
    """A row for each configuration, over the tasks that all of them have finished: what is gained, and for what."""
    tasks = shared_tasks(record)
    rows = []
    for name in record.configurations:
        own = [run for run in _of(record, name) if run["task"] in tasks]
        if not own:
            continue
        rows.append(
            [
                name,
                percent(mean_score(own)),
                f"{statistics.median(run['parameters']['trainable'] for run in own):,.0f}",
                f"{_sum_of_tasks(own, seconds_of) / 3600:.2f}",
                f"{_sum_of_tasks(own, core_seconds_of) / 3600:.2f}",
                _megabytes(max(map(memory_of, own))),
                _megabytes(_sum_of_tasks(own, bytes_of), 2),
            ]
        )
    head = ["configuration", f"mean score of {len(tasks)} tasks, %", "trained parameters", "hours", "core-hours"]
    return table([*head, "peak memory, MB", "files, MB"], rows)


def guide(record: SuiteRecord) -> str:
    """What the measurements say to choose, in sentences."""
    tasks = shared_tasks(record)
    by_name = {
        name: own
        for name in record.configurations
        if (own := [run for run in _of(record, name) if run["task"] in tasks])
    }
    if len(by_name) < 2:
        raise DataError("a guide compares configurations; this suite has finished tasks of fewer than two in common")
    best = max(by_name, key=lambda name: mean_score(by_name[name]))
    lines = [f"Over {', '.join(tasks)} on `{record.base['name']}`, `{best}` has the best mean score."]
    for name, own in by_name.items():
        if name == best:
            continue
        behind = 100 * (mean_score(by_name[best]) - mean_score(own))
        share = _sum_of_tasks(own, seconds_of) / _sum_of_tasks(by_name[best], seconds_of)
        size = _sum_of_tasks(own, bytes_of) / _sum_of_tasks(by_name[best], bytes_of)
        winners = [task for task in tasks if mean_score(_at(own, task)) > mean_score(_at(by_name[best], task))]
        within = [task for task in tasks if _overlap(_at(own, task), _at(by_name[best], task))]
        lines.append(
            f"- `{name}` is {behind:.1f} points behind it on average, takes {share:.2f} times its time, and leaves "
            f"{size:.3f} times its bytes. It is ahead on {', '.join(winners) or 'no task'}; the seeds of both overlap "
            f"on {', '.join(within) or 'no task'}."
        )
    return "\n".join(lines)


def groups(record: SuiteRecord) -> list[tuple[str, str, list[Run]]]:
    """The runs by task and configuration, in the order of the plan; those without a finished run are left out."""
    order = dict.fromkeys(task for of_tasks in record.configurations.values() for task in of_tasks)
    found = []
    for task in order:
        for name in record.configurations:
            runs = _at(_of(record, name), task)
            if runs:
                found.append((task, name, runs))
    return found


def shared_tasks(record: SuiteRecord) -> list[str]:
    """The tasks that every configuration with a finished run has finished."""
    finished = [{run["task"] for run in _of(record, name)} for name in record.configurations]
    common = set.intersection(*each) if (each := [tasks for tasks in finished if tasks]) else set()
    return [task for task in dict.fromkeys(run["task"] for run in record.runs) if task in common]


def mean_score(runs: Sequence[Run]) -> float:
    """The mean over tasks of the mean over seeds."""
    tasks = dict.fromkeys(run["task"] for run in runs)
    return statistics.fmean(_mean(_at(runs, task), lambda run: run["value"]) for task in tasks)


def glue_average(record: SuiteRecord, configuration: str) -> float | None:
    """The mean score of the eight tasks; None where one is missing."""
    runs = [run for run in _of(record, configuration) if run["task"] in GLUE]
    return mean_score(runs) if {run["task"] for run in runs} == set(GLUE) else None


def metric_words(run: Run) -> str:
    """A metric as a person reads it."""
    return run["metric"].replace("_correlation", "").replace("_", " ")


def seconds_of(run: Run) -> float:
    """The whole run, with the writing and scoring of its texts; of runs that trained together its share."""
    return run["timings"]["total"] / run.get("together", 1) + sum(run.get("texts", {}).get("timings", {}).values())


def core_seconds_of(run: Run) -> float:
    """The cores that were the run's own, for as long as it took."""
    return seconds_of(run) * (run["threads"] or 1)


def memory_of(run: Run) -> int:
    """The peak, on the GPU where there is one."""
    return run["memory"].get("cuda") or run["memory"]["rss"]


def bytes_of(run: Run) -> int:
    """The files of what was trained."""
    return sum(run["files"].values())


def _gap(compared: dict[str, Any]) -> str:
    if "why_not" in compared:
        return compared["why_not"]
    return f"{compared['gap']:+.1f} ({compared['score']:.1f}±{compared['spread']:.1f})"


def _full_models(record: SuiteRecord, tasks: Sequence[str]) -> tuple[float | None, bool]:
    """The bytes of a full model a task, and whether full runs of these very tasks say so."""
    full = [run for run in record.runs if run["method"] == "full" and run["task"] in tasks]
    if {run["task"] for run in full} == set(tasks):
        return _sum_of_tasks(full, bytes_of), True
    base = record.base["bytes"]
    return (None if base is None else len(tasks) * base), False


def _of(record: SuiteRecord, configuration: str) -> list[Run]:
    return [run for run in record.runs if run["configuration"] == configuration]


def _at(runs: Sequence[Run], task: str) -> list[Run]:
    return [run for run in runs if run["task"] == task]


def _mean(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    return statistics.fmean(map(value, runs))


def _sum_of_tasks(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    """Of one run a task: the mean over its seeds, summed over the tasks."""
    return sum(_mean(_at(runs, task), value) for task in dict.fromkeys(run["task"] for run in runs))


def _overlap(ours: Sequence[Run], theirs: Sequence[Run]) -> bool:
    low, high = (sorted(run["value"] for run in runs) for runs in (ours, theirs))
    return len(low) > 1 and len(high) > 1 and low[0] <= high[-1] and high[0] <= low[-1]


def _megabytes(value: float, digits: int = 0) -> str:
    return f"{value / 1e6:,.{digits}f}"


def from_results(render: Callable[[SuiteRecord], str]) -> Callable[[Path], str]:
    """The same for `report`: of every record in `docs/results/suite/`, each under its name.

    The function raises DataError where there is none.
    """

    def of_all(results: Path) -> str:
        parts = []
        for file in record_files(results / "suite"):
            record = SuiteRecord.load(file)
            caption = f"`{record.base['name']}`, {len(record.runs)} of {record.planned} runs "
            parts.append(f"{caption}([record](results/suite/{file.name})):\n\n{render(record)}")
        return "\n\n".join(parts)

    return of_all
