"""The report of a comparison in Markdown and HTML. Every number in it is in the `ComparisonRecord`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.atomic_io import atomic_folder, check_output_folder
from lora_hf.core.formatting import count, table
from lora_hf.core.records import COMPARISON_FILE, ComparisonRecord
from lora_hf.experiments.compare.disagreements import disagreement_section, texts_section
from lora_hf.experiments.compare.evaluation import calibration_table, evaluation_sections
from lora_hf.experiments.compare.markdown import escape, to_html
from lora_hf.experiments.compare.plots import draw_plots, majority_of, score_of

MARK = "†"


def check_report_folder(folder: Path) -> None:
    """Raises ConfigError if the folder contains anything but an earlier report."""
    check_output_folder(folder, COMPARISON_FILE, overwrite=_is_report(folder))


def write_report(record: ComparisonRecord, folder: Path) -> dict[str, Path]:
    """Writes record, plots and pages, replacing an earlier report; returns the paths of record and pages.

    Raises:
        ConfigError: as `check_report_folder`; also if the folder cannot be written.
    """
    files = {"record": COMPARISON_FILE, "report": "report.md", "page": "report.html"}
    with atomic_folder(folder, COMPARISON_FILE, overwrite=_is_report(folder)) as partial:
        record.write(partial / COMPARISON_FILE)
        plots = {task["task"]: draw_plots(task, partial) for task in record.tasks}
        text = render_report(record, plots)
        (partial / "report.md").write_text(text, encoding="utf-8")
        page = to_html(text, f"Comparison of runs: {', '.join(plots)}", partial)
        (partial / "report.html").write_text(page, encoding="utf-8")
    return {name: folder / file for name, file in files.items()}


def _is_report(folder: Path) -> bool:
    return (folder / COMPARISON_FILE).is_file()


def render_report(record: ComparisonRecord, plots: dict[str, dict[str, str]]) -> str:
    """The report in Markdown.

    Args:
        plots: file names by task and kind.
    """
    configurations = [(task["task"], row) for task in record.tasks for row in task["configurations"]]
    parts = [
        "# Comparison of runs",
        f"Created {record.made} from the records listed at the end.",
        _list(
            "Tasks:",
            (
                f"**{task['task']}**: {count(len(task['configurations']), 'configuration')}, "
                f"{count(task['runs'], 'run')}"
                for task in record.tasks
            ),
        ),
        _list("Left out:", (f"{escape(each['path'])}: {escape(each['reason'])}" for each in record.left_out)),
        _list(
            f"Not comparable with most other configurations of their task, and marked {MARK} below. If the data "
            "differ, scores are not compared; otherwise only speed, time and memory are not compared:",
            (
                f"{task}, {row['key']} ({escape(row['label'])}): {aspect}: {escape(difference)}"
                for task, row in configurations
                for aspect, difference in row["differs"].items()
            ),
        ),
    ]
    for task in record.tasks:
        parts += _task_sections(record, task, plots.get(task["task"], {}))
    runs = [
        [run["task"], run["configuration"], escape(run["folder"]), run["started"], run["seed"], f"{run['score']:.4f}"]
        for run in record.runs
    ]
    parts += ["## Records", table(["task", "", "folder", "started", "seed", "score"], runs, text_columns=4)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _list(heading: str, items: Iterable[str]) -> str:
    """A heading with a list; nothing without items."""
    lines = [f"- {item}" for item in items]
    return "\n".join([heading, "", *lines]) if lines else ""


def _task_sections(record: ComparisonRecord, task: dict[str, Any], plots: dict[str, str]) -> Iterator[str]:
    better = "greater is better" if task["greater_is_better"] else "lower is better"
    rows = ", ".join(f"{escape(split)} {number:,}" for split, number in task["rows"].items())
    base = f" Base model: {escape(task['base'])}." if task["base"] else ""
    yield f"## {task['task']}"
    yield f"Compared by {escape(task['metric'])} on {escape(task['split'])} ({better}). Rows: {rows}.{base}"
    yield _main_table(record, task)
    yield _explanation(record, task)
    yield from _all_scores(record, task)
    warnings = (f"{row['key']}: {escape(text)}" for row in task["configurations"] for text in row["warnings"])
    yield _list("Warnings of the runs:", warnings)
    yield from _tests(record, task)
    for kind, title, text in (
        ("curves", "Learning curves", ""),
        ("parameters", "Score and trainable parameters", ""),
        ("time", "Score and training time", ""),
        ("memory", "Peak memory by part", _memory(task)),
        ("confusion", "Confusion matrices", "Each configuration is represented by the run with the median score."),
        ("reliability", "Calibration", calibration_table(task)),
    ):
        if kind in plots:
            yield f"### {title}\n\n![{title}, {task['task']}]({plots[kind]})"
            yield text
    yield from evaluation_sections(task)
    yield disagreement_section(task["disagreements"])
    yield from map(texts_section, task["written"])
    yield from _text_scores(task)


def _confidence(record: ComparisonRecord) -> str:
    return f"{100 * record.statistics['confidence']:g} %"


def _decimals(value: float) -> str:
    """Three decimals, never -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{_decimals(interval[0])} to {_decimals(interval[1])}"


def _range(score: dict[str, Any], runs: int) -> str:
    return f"{score['min']:.3f} to {score['max']:.3f}" if runs > 1 else "-"


def _main_table(record: ComparisonRecord, task: dict[str, Any]) -> str:
    rows, better = task["configurations"], max if task["greater_is_better"] else min
    scores = [score_of(task, row) for row in rows]
    columns = {
        "": [row["key"] for row in rows],
        "configuration": [escape(row["label"]) + ("" if row["comparable"] else f" {MARK}") for row in rows],
        "runs": [row["runs"] for row in rows],
        escape(task["metric"]): _ranked(rows, "same_data", lambda row: score_of(task, row)["mean"], ".3f", better),
        "range": [_range(score, row["runs"]) for score, row in zip(scores, rows, strict=True)],
        f"{_confidence(record)} interval": [_interval(score["interval"]) for score in scores],
        "trainable parameters": [f"{row['parameters']['trainable']:,}" for row in rows],
        "examples/s": _ranked(rows, "comparable", lambda row: row["examples_per_second"]["mean"], ".1f", max),
        "peak memory, MB": _ranked(rows, "comparable", lambda row: row["peak_memory"] / 1e6, ",.0f", min),
        "checkpoint, MB": [f"{row['checkpoint'] / 1e6:.2f}" for row in rows],
        "training, s": _ranked(rows, "comparable", lambda row: row["train_seconds"]["mean"], ".1f", min),
        f"to {task['quality']:.3f}, s": [_time_to_quality(row) for row in rows],
    }
    if record.options.get("price_per_hour") is not None:
        currency = escape(record.options["currency"])
        columns[f"one run, {currency}"] = [f"{row['cost']['mean']:.4f}" for row in rows]
        columns[f"all runs, {currency}"] = [f"{row['cost']['all']:.4f}" for row in rows]
    lines = list(zip(*columns.values(), strict=True))
    majority = majority_of(task)
    if majority is not None:
        lines.append(("-", "majority class", "-", f"{majority:.3f}", *["-"] * (len(columns) - 4)))
    return table(list(columns), lines, text_columns=2)


def _ranked(
    rows: Sequence[dict[str, Any]], key: str, value: Callable[..., float], precision: str, better: Callable[..., float]
) -> list[str]:
    """The values: the best in bold, in parentheses those of rows where `key`, which says if they compare, is false."""
    values = [value(row) for row in rows if row[key]]
    best = better(values) if len(values) > 1 else None
    cells = []
    for row in rows:
        text = f"{value(row):{precision}}"
        bold = f"**{text}**" if value(row) == best else text
        cells.append(bold if row[key] else f"({text})")
    return cells


def _time_to_quality(row: dict[str, Any]) -> str:
    time = row["time_to_quality"]
    if not time["reached"]:
        return "not reached"
    text = f"{time['seconds']:.1f}"
    text += f" ({time['reached']} of {row['runs']} runs)" if time["reached"] < row["runs"] else ""
    return text if row["comparable"] else f"({text})"


def _explanation(record: ComparisonRecord, task: dict[str, Any]) -> str:
    statistics, options, rows = record.statistics, record.options, task["configurations"]
    interval = (
        f"The {_confidence(record)} interval is a bootstrap over the rows of the split ({statistics['resamples']:,} "
        f"resamples, seed {statistics['seed']}) of the mean over the seeds. It shows how much the score varies with "
        "the rows, not with the seeds."
    )
    has_intervals = any(score_of(task, row)["interval"] for row in rows)
    reason = "the best score that every run reaches" if options.get("quality") is None else "the requested score"
    sentences = [
        "A row is the mean of runs that differ only in their seed; the range is their lowest to highest.",
        "The best value of a column is bold.",
        interval if has_intervals else "There are no intervals, because the runs saved no predictions.",
        f"The last time is the training time until the first evaluation with {task['quality']:.3f}, {reason};",
        "it is interpolated from steps.",
    ]
    if options.get("price_per_hour") is not None:
        price = f"{options['price_per_hour']:g} {escape(options['currency'])}"
        sentences.append(f"The cost is the training time at {price} an hour.")
    return " ".join(sentences)


def _all_scores(record: ComparisonRecord, task: dict[str, Any]) -> Iterator[str]:
    names = [(split, metric) for split, metrics in task["configurations"][0]["scores"].items() for metric in metrics]
    if len(names) == 1:
        return  # the main table has them
    rows = [
        [row["key"], escape(split), escape(metric), f"{score['mean']:.3f}", _range(score, row["runs"]),
         _interval(score["interval"])]
        for split, metric in names
        for row in task["configurations"]
        for score in [row["scores"][split][metric]]
    ]  # fmt: skip
    rows += [
        ["majority class", escape(split), escape(metric), f"{value:.3f}", "-", "-"]
        for split, metrics in task["majority"].items()
        for metric, value in metrics.items()
    ]
    yield "### All scores"
    yield table(["", "split", "metric", "mean", "range", f"{_confidence(record)} interval"], rows, text_columns=3)


def _tests(record: ComparisonRecord, task: dict[str, Any]) -> Iterator[str]:
    tests = task["tests"]
    if not tests:
        return
    head = ["", escape(task["metric"]), f"{_confidence(record)} interval", "p", "p (Holm)"]
    rows = [
        [
            f"{test['first']}\u00a0-\u00a0{test['second']}",
            _decimals(test["difference"]),
            _interval(test["interval"]),
            f"{test['p']:.2g}",
            f"{test['holm']:.2g}",
        ]
        for test in tests
    ]
    explanation = (
        f"{count(task['pairs'], 'pair')} tested. The difference is between the means over the seeds. Its interval and "
        "p-value come from the paired bootstrap. "
    )
    if "mcnemar" in tests[0]:
        head += ["only first right", "only second right", "McNemar p", "McNemar p (Holm)"]
        for row, exact in zip(rows, (test["mcnemar"] for test in tests), strict=True):
            row += [exact["only_first"], exact["only_second"], f"{exact['p']:.2g}", f"{exact['holm']:.2g}"]
        explanation += (
            "McNemar's exact test compares the median runs: it counts the rows that only one predicts right. "
        )
    yield "### Pairwise tests"
    yield table(head, rows)
    yield explanation + "With several pairs, read the columns with Holm's correction for multiple tests."


def _memory(task: dict[str, Any]) -> str:
    rows = task["configurations"]
    head = ["", "peak, MB", *(f"{part}, MB" for part in rows[0]["memory_parts"])]
    body = [
        [
            row["key"],
            f"{row['peak_memory'] / 1e6:,.0f}",
            *(f"{part / 1e6:,.1f}" for part in row["memory_parts"].values()),
        ]
        for row in rows
    ]
    return table(head, body) + (
        "\n\nThe peak is measured. The last part is the remainder; the others are computed from the parameter counts: "
        "frozen weights in the precision of the base, and trained weights, gradients and AdamW's two moments in fp32."
    )


def _text_scores(task: dict[str, Any]) -> Iterator[str]:
    scored = [(row["key"], scores) for row in task["configurations"] for scores in row["text_scores"]]
    rows = [
        [key, scores["seed"], escape(scores["name"]), escape(subset), scores["inputs"]]
        + ["null" if value is None else f"{value:.4f}" for value in values.values()]
        for key, scores in scored
        for subset, values in scores["metrics"].items()
    ]
    if rows:
        yield "### Scores of the generated texts"
        names = next(iter(scored[0][1]["metrics"].values()))
        yield table(["", "seed", "split", "subset", "inputs", *names], rows, text_columns=4)
