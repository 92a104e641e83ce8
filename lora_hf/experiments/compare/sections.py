"""`report.md`: a `ComparisonRecord` in words, tables and pictures. Every number in it stands in the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lora_hf.core.formatting import table
from lora_hf.core.records import ComparisonRecord
from lora_hf.experiments.compare.quotes import disagreement_section, plain, written_section

Pictures = dict[str, dict[str, str]]  # by task and kind the file's name
MARK = "†"


def report(record: ComparisonRecord, pictures: Pictures) -> str:
    """The whole report."""
    parts = [_top(record)]
    for task in record.tasks:
        parts += [part for part in _task(record, task, pictures.get(task["task"], {})) if part]
    return "\n\n".join([*parts, _records(record)]) + "\n"


def _top(record: ComparisonRecord) -> str:
    tasks = [
        f"- **{task['task']}**: {_count(len(task['configurations']), 'configuration')}, {_count(task['runs'], 'run')}"
        for task in record.tasks
    ]
    lines = ["# Comparison of runs", f"Made {record.made} from the records listed at the end.", "\n".join(tasks)]
    lines.append(_listed("Left out:", [f"{plain(each['path'])}: {plain(each['reason'])}" for each in record.left_out]))
    marked = [
        f"{task['task']}, {row['key']} ({plain(row['label'])}): {aspect}: {plain(words)}"
        for task in record.tasks
        for row in task["configurations"]
        for aspect, words in row["differs"].items()
    ]
    lines.append(
        _listed(
            f"Not comparable with most others of their task, and marked {MARK} below. Where the data differ the scores "
            "are not compared either; otherwise only speed, time and memory are left out of the ranking:",
            marked,
        )
    )
    return "\n\n".join(line for line in lines if line)


def _listed(opening: str, items: Sequence[str]) -> str:
    return "\n".join([opening, "", *(f"- {item}" for item in items)]) if items else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _task(record: ComparisonRecord, task: dict[str, Any], pictures: dict[str, str]) -> Iterator[str]:
    yield f"## {task['task']}"
    yield _setting(task)
    yield _main_table(record, task)
    yield _reading(record, task)
    yield _all_scores(record, task)
    yield _listed("The runs themselves warned:", _warnings(task))
    yield _tests(record, task)
    for kind, title in (
        ("curves", "Learning curves"),
        ("parameters", "Quality against trained parameters"),
        ("time", "Quality against time"),
    ):
        if kind in pictures:
            yield f"### {title}\n\n{_picture(task, title, pictures[kind])}"
    yield _memory(task, pictures)
    if "confusion" in pictures:
        middle = "The run with the middle score stands for its configuration. Dark: a large share of the class."
        yield f"### Confusion by class\n\n{_picture(task, 'Confusion by class', pictures['confusion'])}\n\n{middle}"
    yield disagreement_section(task)
    for texts in task["written"]:
        yield written_section(texts)
    yield _text_scores(task)


def _picture(task: dict[str, Any], title: str, file: str) -> str:
    return f"![{title}, {task['task']}]({file})"


def _setting(task: dict[str, Any]) -> str:
    rows = [f"{count:,} rows of {plain(split)}" for split, count in task["rows"].items()]
    best = "greater is better" if task["greater_is_better"] else "less is better"
    base = f" The base is {plain(task['base'])}." if task["base"] else ""
    return f"{', '.join(rows)}. Compared by {plain(task['metric'])} on {plain(task['split'])} ({best}).{base}"


def _confidence(record: ComparisonRecord) -> str:
    return f"{100 * record.statistics['confidence']:g} %"


def _score(task: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return row["scores"][task["split"]][task["metric"]]


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{_three(interval[0])} to {_three(interval[1])}"


def _three(value: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def _spread(score: dict[str, Any], runs: int) -> str:
    return f"{score['min']:.3f} to {score['max']:.3f}" if runs > 1 else "-"


def _main_table(record: ComparisonRecord, task: dict[str, Any]) -> str:
    rows = task["configurations"]
    head = ["", "configuration", "runs", plain(task["metric"]), "least to greatest", f"{_confidence(record)} interval"]
    head += ["trained parameters", "examples/s", "peak memory, MB", "checkpoint, MB", "training, s"]
    head += [f"to {task['quality']:.3f}, s"]
    columns = [
        _ranked(rows, "same_data", lambda row: _score(task, row)["mean"], "{:.3f}", task["greater_is_better"]),
        [_spread(_score(task, row), row["runs"]) for row in rows],
        [_interval(_score(task, row)["interval"]) for row in rows],
        [f"{row['parameters']['trainable']:,}" for row in rows],
        _ranked(rows, "comparable", lambda row: row["examples_per_second"]["mean"], "{:.1f}", True),
        _ranked(rows, "comparable", lambda row: row["peak_memory"] / 1e6, "{:,.0f}", False),
        [f"{row['checkpoint'] / 1e6:.2f}" for row in rows],
        _ranked(rows, "comparable", lambda row: row["train_seconds"]["mean"], "{:.1f}", False),
        [_reached(row) for row in rows],
    ]
    if record.options.get("price_per_hour") is not None:
        unit = plain(record.options["currency"])
        head += [f"a run, {unit}", f"all runs, {unit}"]
        columns += [[f"{row['cost'][which]:.4f}" for row in rows] for which in ("mean", "all")]
    lines = [
        [row["key"], plain(row["label"]) + ("" if row["comparable"] else f" {MARK}"), str(row["runs"]), *cells]
        for row, cells in zip(rows, zip(*columns, strict=True), strict=True)
    ]
    constant = task["majority"].get(task["split"], {}).get(task["metric"])
    if constant is not None:
        lines.append(["-", "always the same answer", "-", f"{constant:.3f}", *["-"] * (len(head) - 4)])
    return table(head, lines, text_columns=2)


def _ranked(
    rows: Sequence[dict[str, Any]],
    comparable: str,
    value: Callable[[dict[str, Any]], float],
    form: str,
    greater: bool,
) -> list[str]:
    """The values, the best of those that may be compared in bold; those that may not in parentheses."""
    able = [value(row) for row in rows if row[comparable]]
    best = (max if greater else min)(able) if len(able) > 1 else None
    shown = []
    for row in rows:
        text = form.format(value(row))
        if not row[comparable]:
            text = f"({text})"
        shown.append(f"**{text}**" if row[comparable] and value(row) == best else text)
    return shown


def _reached(row: dict[str, Any]) -> str:
    found = row["time_to_quality"]
    if not found["reached"]:
        return "not reached"
    text = f"{found['seconds']:.1f}"
    text += f" ({found['reached']} of {row['runs']} runs)" if found["reached"] < row["runs"] else ""
    return text if row["comparable"] else f"({text})"


def _reading(record: ComparisonRecord, task: dict[str, Any]) -> str:
    statistics = record.statistics
    asked = "the quality asked for" if record.options.get("quality") is not None else "what every run reaches"
    lines = ["Runs that differ in their seed only are one row: their mean, the least and the greatest of them."]
    lines.append("The best of a column is bold.")
    if any(_score(task, row)["interval"] for row in task["configurations"]):
        lines.append(
            f"The {_confidence(record)} interval is the bootstrap's, over the rows of the split "
            f"({statistics['resamples']:,} resamples, seed {statistics['seed']}), of the mean over the seeds: it says "
            "how far other rows of the same kind would move the score, not how far other seeds would."
        )
    else:
        lines.append("There are no intervals here: these runs kept no answer for each row.")
    lines.append(
        f"The last time is the training up to the first evaluation with {task['quality']:.3f} ({asked}), "
        "interpolated from steps."
    )
    if record.options.get("price_per_hour") is not None:
        price, currency = record.options["price_per_hour"], plain(record.options["currency"])
        lines.append(f"The cost is that of the hours of training at {price:g} {currency} an hour, the price as given.")
    shared = [f"{row['key']} ({row['together']} runs)" for row in task["configurations"] if row["together"] > 1]
    if shared:
        lines.append(
            f"Trained in the same batches as other runs: {', '.join(shared)}. Speed, time and memory are those of all "
            "of them together; of the cost each bears its share."
        )
    return " ".join(lines)


def _all_scores(record: ComparisonRecord, task: dict[str, Any]) -> str:
    rows = [
        [row["key"], plain(split), plain(metric), f"{score['mean']:.3f}", _spread(score, row["runs"]),
         _interval(score["interval"])]
        for split, metrics in task["configurations"][0]["scores"].items()
        for metric in metrics
        for row in task["configurations"]
        for score in [row["scores"][split][metric]]
    ]  # fmt: skip
    if len(rows) == len(task["configurations"]):
        return ""
    rows += [
        ["-", plain(split), plain(metric), f"{value:.3f}", "-", "-"]
        for split, metrics in task["majority"].items()
        for metric, value in metrics.items()
    ]
    head = ["", "split", "metric", "mean", "least to greatest", f"{_confidence(record)} interval"]
    return (
        f"### All scores\n\n{table(head, rows, text_columns=3)}\n\nThe rows without a letter: always the same answer."
    )


def _warnings(task: dict[str, Any]) -> list[str]:
    return [f"{row['key']}: {plain(warning)}" for row in task["configurations"] for warning in row["warnings"]]


def _tests(record: ComparisonRecord, task: dict[str, Any]) -> str:
    tests = task["tests"]
    if not tests:
        return ""
    exact = "mcnemar" in tests[0]
    head = ["", plain(task["metric"]), f"{_confidence(record)} interval", "p", "p, Holm"]
    head += ["only the first right", "only the second right", "McNemar's p", "McNemar's p, Holm"] if exact else []
    rows = []
    for test in tests:
        cells = [
            f"{test['first']}\u00a0-\u00a0{test['second']}",
            _three(test["difference"]),
            _interval(test["interval"]),
        ]
        cells += [_p(test["p"]), _p(test["holm"])]
        if exact:
            counts = test["mcnemar"]
            cells += [str(counts["only_first"]), str(counts["only_second"]), _p(counts["p"]), _p(counts["holm"])]
        rows.append(cells)
    words = [f"{_count(task['pairs'], 'pair')} tested. The difference is that of the means over the seeds;"]
    words.append("its interval and p are the paired bootstrap's, on the same resampled rows.")
    if exact:
        words.append("McNemar's exact test counts the rows that only one of the two middle runs got right.")
    words.append("Holm's correction is for the number of pairs: read these columns where several pairs were tested.")
    return f"### Do they differ?\n\n{table(head, rows)}\n\n{' '.join(words)}"


def _p(value: float) -> str:
    return f"{value:.2g}"


def _memory(task: dict[str, Any], pictures: dict[str, str]) -> str:
    rows = task["configurations"]
    if "memory" not in pictures:
        return ""
    body = []
    for row in rows:
        parts = [f"{part / 1e6:,.1f}" for part in row["memory_parts"].values()]
        body.append([row["key"], f"{row['peak_memory'] / 1e6:,.0f}", *parts])
    head = ["", "peak, MB", *(f"{part}, MB" for part in rows[0]["memory_parts"])]
    words = (
        "The peak is measured. All parts but the last are computed from the counts of parameters: frozen weights in "
        "the precision of the base; what is trained, its gradients and AdamW's two moments in fp32. The last is what "
        "remains."
    )
    picture = _picture(task, "Memory by part", pictures["memory"])
    return f"### Memory by part\n\n{picture}\n\n{table(head, body)}\n\n{words}"


def _text_scores(task: dict[str, Any]) -> str:
    found = [
        [row["key"], str(scores["seed"]), plain(scores["name"]), plain(subset), str(scores["inputs"]),
         *("null" if value is None else f"{value:.4f}" for value in values.values())]
        for row in task["configurations"]
        for scores in row["text_scores"]
        for subset, values in scores["metrics"].items()
    ]  # fmt: skip
    if not found:
        return ""
    names = next(
        values
        for row in task["configurations"]
        for scores in row["text_scores"]
        for values in scores["metrics"].values()
    )
    return "### Scores of the texts\n\n" + table(
        ["", "seed", "split", "inputs of", "inputs", *names], found, text_columns=4
    )


def _records(record: ComparisonRecord) -> str:
    rows = []
    for run in record.runs:
        said = [run["task"], run["configuration"], plain(run["folder"]), run["started"]]
        rows.append([*said, str(run["seed"]), f"{run['score']:.4f}"])
    return "## Records\n\n" + table(["task", "", "folder", "started", "seed", "score"], rows, text_columns=4)
