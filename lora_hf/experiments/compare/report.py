"""The report of a comparison in Markdown and HTML. Every number in it is in the `ComparisonRecord`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.atomic_io import atomic_folder, check_output_folder
from lora_hf.core.formatting import table
from lora_hf.core.records import COMPARISON_FILE, ComparisonRecord
from lora_hf.experiments.compare.disagreements import disagreement_section, texts_section
from lora_hf.experiments.compare.markdown import escape, to_html
from lora_hf.experiments.compare.plots import draw_plots

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
    parts = [*_summary(record)]
    for task in record.tasks:
        parts += _task_sections(record, task, plots.get(task["task"], {}))
    parts.append(_records(record))
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(record: ComparisonRecord) -> Iterator[str]:
    yield "# Comparison of runs"
    yield f"Created {record.made} from the records listed at the end."
    yield _list(
        "Tasks:",
        [
            f"**{task['task']}**: {_count(len(task['configurations']), 'configuration')}, {_count(task['runs'], 'run')}"
            for task in record.tasks
        ],
    )
    yield _list("Left out:", [f"{escape(each['path'])}: {escape(each['reason'])}" for each in record.left_out])
    yield _list(
        f"Not comparable with most other configurations of their task, and marked {MARK} below. If the data differ, "
        "scores are not compared; otherwise only speed, time and memory are not compared:",
        [
            f"{task['task']}, {row['key']} ({escape(row['label'])}): {aspect}: {escape(difference)}"
            for task in record.tasks
            for row in task["configurations"]
            for aspect, difference in row["differs"].items()
        ],
    )


def _list(heading: str, items: Sequence[str]) -> str:
    return "\n".join([heading, "", *(f"- {item}" for item in items)]) if items else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _task_sections(record: ComparisonRecord, task: dict[str, Any], plots: dict[str, str]) -> Iterator[str]:
    yield f"## {task['task']}"
    yield _setting(task)
    yield _main_table(record, task)
    yield _explanation(record, task)
    yield _all_scores(record, task)
    warnings = [f"{row['key']}: {escape(text)}" for row in task["configurations"] for text in row["warnings"]]
    yield _list("Warnings of the runs:", warnings)
    yield _tests(record, task)
    for kind, title, text in (
        ("curves", "Learning curves", ""),
        ("parameters", "Score and trainable parameters", ""),
        ("time", "Score and training time", ""),
        ("memory", "Peak memory by part", _memory(task)),
        ("confusion", "Confusion matrices", "Each configuration is represented by the run with the median score."),
    ):
        if kind in plots:
            yield f"### {title}\n\n![{title}, {task['task']}]({plots[kind]})"
            yield text
    yield disagreement_section(task["disagreements"])
    yield from map(texts_section, task["written"])
    yield _text_scores(task)


def _setting(task: dict[str, Any]) -> str:
    rows = ", ".join(f"{escape(split)} {count:,}" for split, count in task["rows"].items())
    better = "greater is better" if task["greater_is_better"] else "lower is better"
    base = f" Base model: {escape(task['base'])}." if task["base"] else ""
    return f"Compared by {escape(task['metric'])} on {escape(task['split'])} ({better}). Rows: {rows}.{base}"


def _confidence(record: ComparisonRecord) -> str:
    return f"{100 * record.statistics['confidence']:g} %"


def _score(task: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return row["scores"][task["split"]][task["metric"]]


def _decimals(value: float) -> str:
    """Three decimals, never -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{_decimals(interval[0])} to {_decimals(interval[1])}"


def _range(score: dict[str, Any], runs: int) -> str:
    return f"{score['min']:.3f} to {score['max']:.3f}" if runs > 1 else "-"


def _main_table(record: ComparisonRecord, task: dict[str, Any]) -> str:
    rows, greater = task["configurations"], task["greater_is_better"]
    columns = {
        "": [row["key"] for row in rows],
        "configuration": [escape(row["label"]) + ("" if row["comparable"] else f" {MARK}") for row in rows],
        "runs": [str(row["runs"]) for row in rows],
        escape(task["metric"]): _ranked(rows, "same_data", lambda row: _score(task, row)["mean"], "{:.3f}", greater),
        "range": [_range(_score(task, row), row["runs"]) for row in rows],
        f"{_confidence(record)} interval": [_interval(_score(task, row)["interval"]) for row in rows],
        "trainable parameters": [f"{row['parameters']['trainable']:,}" for row in rows],
        "examples/s": _ranked(rows, "comparable", lambda row: row["examples_per_second"]["mean"], "{:.1f}", True),
        "peak memory, MB": _ranked(rows, "comparable", lambda row: row["peak_memory"] / 1e6, "{:,.0f}", False),
        "checkpoint, MB": [f"{row['checkpoint'] / 1e6:.2f}" for row in rows],
        "training, s": _ranked(rows, "comparable", lambda row: row["train_seconds"]["mean"], "{:.1f}", False),
        f"to {task['quality']:.3f}, s": [_time_to_quality(row) for row in rows],
    }
    if record.options.get("price_per_hour") is not None:
        currency = escape(record.options["currency"])
        columns[f"one run, {currency}"] = [f"{row['cost']['mean']:.4f}" for row in rows]
        columns[f"all runs, {currency}"] = [f"{row['cost']['all']:.4f}" for row in rows]
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    majority = task["majority"].get(task["split"], {}).get(task["metric"])
    if majority is not None:
        lines.append(["-", "majority class", "-", f"{majority:.3f}", *["-"] * (len(columns) - 4)])
    return table(list(columns), lines, text_columns=2)


def _ranked(
    rows: Sequence[dict[str, Any]],
    comparable: str,
    value: Callable[[dict[str, Any]], float],
    template: str,
    greater_is_better: bool,
) -> list[str]:
    """The values: the best in bold, those that are not comparable in parentheses."""
    values = [value(row) for row in rows if row[comparable]]
    best = (max if greater_is_better else min)(values) if len(values) > 1 else None
    cells = []
    for row in rows:
        text = template.format(value(row))
        if not row[comparable]:
            text = f"({text})"
        elif value(row) == best:
            text = f"**{text}**"
        cells.append(text)
    return cells


def _time_to_quality(row: dict[str, Any]) -> str:
    time = row["time_to_quality"]
    if not time["reached"]:
        return "not reached"
    text = f"{time['seconds']:.1f}"
    text += f" ({time['reached']} of {row['runs']} runs)" if time["reached"] < row["runs"] else ""
    return text if row["comparable"] else f"({text})"


def _explanation(record: ComparisonRecord, task: dict[str, Any]) -> str:
    statistics, options = record.statistics, record.options
    sentences = ["A row is the mean of runs that differ only in their seed; the range is their lowest to highest."]
    sentences.append("The best value of a column is bold.")
    if any(_score(task, row)["interval"] for row in task["configurations"]):
        sentences.append(
            f"The {_confidence(record)} interval is a bootstrap over the rows of the split "
            f"({statistics['resamples']:,} resamples, seed {statistics['seed']}) of the mean over the seeds. It shows "
            "how much the score varies with the rows, not with the seeds."
        )
    else:
        sentences.append("There are no intervals, because the runs saved no predictions.")
    reason = "the best score that every run reaches" if options.get("quality") is None else "the requested score"
    sentences.append(
        f"The last time is the training time until the first evaluation with {task['quality']:.3f}, {reason}; it is "
        "interpolated from steps."
    )
    if options.get("price_per_hour") is not None:
        price = f"{options['price_per_hour']:g} {escape(options['currency'])}"
        sentences.append(f"The cost is the training time at {price} an hour.")
    together = [f"{row['key']} ({row['together']} runs)" for row in task["configurations"] if row["together"] > 1]
    if together:
        sentences.append(
            f"Trained together in the same batches: {', '.join(together)}. Their speed, time and memory are those of "
            "all runs together; the cost of each is its share."
        )
    return " ".join(sentences)


def _all_scores(record: ComparisonRecord, task: dict[str, Any]) -> str:
    rows = []
    for split, metrics in task["configurations"][0]["scores"].items():
        for metric in metrics:
            for row in task["configurations"]:
                score = row["scores"][split][metric]
                cells = [f"{score['mean']:.3f}", _range(score, row["runs"]), _interval(score["interval"])]
                rows.append([row["key"], escape(split), escape(metric), *cells])
    if len(rows) == len(task["configurations"]):
        return ""  # the main table has them
    for split, metrics in task["majority"].items():
        rows += [
            ["majority class", escape(split), escape(metric), f"{metrics[metric]:.3f}", "-", "-"] for metric in metrics
        ]
    head = ["", "split", "metric", "mean", "range", f"{_confidence(record)} interval"]
    return f"### All scores\n\n{table(head, rows, text_columns=3)}"


def _tests(record: ComparisonRecord, task: dict[str, Any]) -> str:
    tests = task["tests"]
    if not tests:
        return ""
    classification = "mcnemar" in tests[0]
    head = ["", escape(task["metric"]), f"{_confidence(record)} interval", "p", "p (Holm)"]
    head += ["only first right", "only second right", "McNemar p", "McNemar p (Holm)"] if classification else []
    rows = []
    for test in tests:
        pair = f"{test['first']}\u00a0-\u00a0{test['second']}"
        cells = [_decimals(test["difference"]), _interval(test["interval"]), f"{test['p']:.2g}", f"{test['holm']:.2g}"]
        if classification:
            exact = test["mcnemar"]
            cells += [str(exact["only_first"]), str(exact["only_second"]), f"{exact['p']:.2g}", f"{exact['holm']:.2g}"]
        rows.append([pair, *cells])
    sentences = [f"{_count(task['pairs'], 'pair')} tested. The difference is between the means over the seeds."]
    sentences.append("Its interval and p-value come from the paired bootstrap.")
    if classification:
        sentences.append(
            "McNemar's exact test compares the median runs: it counts the rows that only one predicts right."
        )
    sentences.append("With several pairs, read the columns with Holm's correction for multiple tests.")
    return f"### Pairwise tests\n\n{table(head, rows)}\n\n{' '.join(sentences)}"


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


def _text_scores(task: dict[str, Any]) -> str:
    rows, names = [], []
    for row in task["configurations"]:
        for scores in row["text_scores"]:
            for subset, values in scores["metrics"].items():
                names = names or list(values)
                cells = ["null" if value is None else f"{value:.4f}" for value in values.values()]
                labels = [str(scores["seed"]), escape(scores["name"]), escape(subset), str(scores["inputs"])]
                rows.append([row["key"], *labels, *cells])
    head = ["", "seed", "split", "subset", "inputs", *names]
    return f"### Scores of the generated texts\n\n{table(head, rows, text_columns=4)}" if rows else ""


def _records(record: ComparisonRecord) -> str:
    rows = [
        [
            run["task"],
            run["configuration"],
            escape(run["folder"]),
            run["started"],
            str(run["seed"]),
            f"{run['score']:.4f}",
        ]
        for run in record.runs
    ]
    return "## Records\n\n" + table(["task", "", "folder", "started", "seed", "score"], rows, text_columns=4)
