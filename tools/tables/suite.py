"""The tables of suites in the docs, one for every record in a folder of `docs/results`, and a guide to choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_hf.core.errors import DataError
from lora_hf.core.records import SuiteRecord, record_files
from lora_hf.experiments.suite.tables import Run, core_seconds, file_bytes, mean_score, shared_runs, task_means

CORRELATIONS = ("pearson", "matthews_correlation")  # the latter is Pearson's of labels that are 0 and 1


def from_results(render: Callable[[SuiteRecord], str], folder: str = "suite") -> Callable[[Path], str]:
    """A function that renders every record in a folder of the results, each with a caption.

    It raises DataError if there is no record.
    """

    def render_all(results: Path) -> str:
        parts = []
        for file in record_files(results / folder):
            record = SuiteRecord.load(file)
            caption = f"`{record.base['name']}`, {len(record.runs)} of {record.planned} runs "
            parts.append(f"{caption}([record](results/{folder}/{file.name})):\n\n{render(record)}")
        return "\n\n".join(parts)

    return render_all


def guide(record: SuiteRecord) -> str:
    """The configuration with the best mean score, and what the others cost and lose, in sentences."""
    by_name = shared_runs(record)
    if len(by_name) < 2:
        raise DataError("a guide needs two configurations that have finished the same task")
    best = max(by_name, key=lambda name: mean_score(by_name[name]))
    best_runs = by_name.pop(best)
    lines = [f"Over {', '.join(best_runs)} on `{record.base['name']}`, `{best}` has the highest mean score."]
    for name, runs in by_name.items():
        behind = 100 * (mean_score(best_runs) - mean_score(runs))
        time, size = (
            sum(task_means(runs, measure)) / sum(task_means(best_runs, measure))
            for measure in (core_seconds, file_bytes)
        )
        close = [task for task in runs if _too_close(runs[task], best_runs[task])]
        ahead = [task for task in runs if mean_score({task: runs[task]}) > mean_score({task: best_runs[task]})]
        verdicts = {
            "better": [task for task in ahead if task not in close],
            "worse": [task for task in runs if task not in (*ahead, *close)],
            "too close to tell": close,
        }
        said = "; ".join(f"{verdict} on {', '.join(tasks)}" for verdict, tasks in verdicts.items() if tasks)
        lines.append(
            f"- `{name}` scores {behind:.1f} points lower on average, takes {time:.2f} times the CPU time, and its "
            f"files are {size:.3f} times as large. It is {said}."
        )
    return "\n".join(lines)


def _too_close(ours: Sequence[Run], theirs: Sequence[Run]) -> bool:
    """Whether the seeds of both overlap, or single seeds lie within two standard errors of their difference.

    The variance of an accuracy p over n validation rows is p(1 - p)/n, that of a correlation r about
    (1 - r^2)^2/(n - 1). Single seeds of another metric cannot be told apart.
    """
    low, high = (sorted(run["value"] for run in runs) for runs in (ours, theirs))
    if len(low) > 1 and len(high) > 1:
        return low[0] <= high[-1] and high[0] <= low[-1]
    if len(low) > 1 or len(high) > 1:
        return False
    rows = next(count for split, count in ours[0]["rows"].items() if split != "train")
    if ours[0]["metric"] == "accuracy":
        variance = sum(value * (1 - value) / rows for value in (low[0], high[0]))
    elif ours[0]["metric"] in CORRELATIONS:
        variance = sum((1 - value**2) ** 2 / (rows - 1) for value in (low[0], high[0]))
    else:
        return True
    return abs(low[0] - high[0]) <= 2 * variance**0.5
