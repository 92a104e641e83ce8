"""Renders the tables in README and docs from records, so that nobody types a number by hand.

A page marks a table with `<!-- table: sst2 -->` and `<!-- end -->`. `python -m tools.report` renders every table from
the records in `docs/results/`. A test fails if a page and its records disagree.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_hf.core.errors import DataError
from lora_hf.core.formatting import minutes, percent, table
from lora_hf.core.records import (
    RunRecord,
    ScoreRecord,
    SweepRecord,
    describe_method,
    describe_run,
    read_json_record,
    record_files,
)
from lora_hf.experiments.suite import tables as suite_tables
from tools.tables import export as export_tables
from tools.tables import models as model_tables
from tools.tables import regret as regret_tables
from tools.tables import robustness as robustness_tables
from tools.tables import serving as serving_tables
from tools.tables import speed as speed_tables
from tools.tables.config import config_keys
from tools.tables.gpu import gpu
from tools.tables.labels import label_scores
from tools.tables.lr_find import lr_find
from tools.tables.suite import from_results, guide

MARKER = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """Returns the page with every table rendered from the records in `results`.

    Raises:
        DataError: the page names an unknown table, or a record is missing or damaged.
    """

    def render(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise DataError(f"no table {name!r}; there are: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name](results)}\n{match[3]}"

    return MARKER.sub(render, text)


def fill_pages(root: Path) -> list[Path]:
    """Renders README.md, its translations and every page in docs/; returns the pages that changed."""
    changed = []
    for page in [*sorted(root.glob("README*.md")), *sorted((root / "docs").glob("**/*.md"))]:
        before = page.read_text(encoding="utf-8")
        after = fill(before, root / "docs" / "results")
        if after != before:
            page.write_text(after, encoding="utf-8")
            changed.append(page)
    return changed


def _runs(folder: Path) -> list[tuple[Path, RunRecord]]:
    return [(file, RunRecord.load(file)) for file in record_files(folder)]


def _sst2(results: Path) -> str:
    runs = _runs(results / "sst2")
    runs.sort(key=lambda run: run[1].metrics["validation"]["accuracy"])
    rows = [["majority class", percent(runs[0][1].majority["validation"]["accuracy"]), *["-"] * 7]]
    for file, record in runs:
        train, counts = record.config["train"], record.parameters
        rows.append(
            [
                describe_run(record),
                percent(record.metrics["validation"]["accuracy"]),
                f"{counts['trainable']:,}",
                percent(counts["trainable"] / counts["total"]),
                f"{sum(record.files.values()) / 1e6:.2f}",
                f"{train['epochs']:g}",
                f"{train['lr']:g}",
                minutes(record.timings["train"]),
                f"[{record.rows['train']:,}](results/sst2/{file.name})",
            ]
        )
    head = [
        "run",
        "accuracy, %",
        "trained parameters",
        "share, %",
        "file, MB",
        "epochs",
        "lr",
        "training",
        "rows (record)",
    ]
    return table(head, rows)


def _e2e(results: Path) -> str:
    rows = []
    for name, trained, scores in (
        ("tiny-gpt2, no adapter", None, "scores-base.json"),
        ("tiny-gpt2", "lora.json", "scores-lora.json"),
        ("SmolLM2-135M-Instruct, prompted with 3 examples", None, "smollm2-prompted.json"),
        ("SmolLM2-135M-Instruct", "smollm2-qv4.json", "smollm2-qv4-scores.json"),
    ):
        method, perplexity, training = "", "-", "-"
        if trained:
            run = RunRecord.load(results / "e2e" / trained)
            method = f" in {run.config['model']['precision']}, {describe_method(run)}, {run.rows['train']:,} rows"
            perplexity = f"{run.metrics['validation']['perplexity']:.2f}"
            training = f"[{minutes(run.timings['total'])}](results/e2e/{trained})"
        scored = ScoreRecord.load(results / "e2e" / scores)
        values = ["null" if value is None else f"{value:.4f}" for value in scored.metrics["all"].values()]
        generation = f"[{minutes(scored.timings['generate'])}](results/e2e/{scores})"
        rows.append([name + method, *values, perplexity, training, generation])
    return table(["model", *scored.metrics["all"], "dev perplexity", "training (record)", "generation (record)"], rows)


def _grouping(results: Path) -> str:
    rows = [
        [
            "grouped by prompt" if record.config["train"]["group_by_prompt"] else "grouped by length",
            f"{record.metrics['validation']['perplexity']:.3f}",
            f"{record.throughput['samples']:.1f}",
            f"[{minutes(record.timings['train'])}](results/grouping/{file.name})",
        ]
        for file, record in _runs(results / "grouping")
    ]
    return table(["batches", "dev perplexity", "examples/s", "training (record)"], rows)


def _sweep(results: Path) -> str:
    """The complete trials of each sweep, the best first."""
    parts = []
    for file in record_files(results / "sweep"):
        record = SweepRecord.load(file)
        keys = list(dict.fromkeys(key for trial in record.trials for key in trial["values"]))
        sign = -1 if record.greater_is_better else 1
        done = [trial for trial in record.trials if trial["state"] == "complete"]
        done.sort(key=lambda trial: sign * trial["score"])
        counts = Counter(trial["state"] for trial in record.trials)
        rows = [
            [
                str(trial["number"]),
                *(_typed(trial["values"].get(key)) for key in keys),
                f"{trial['score']:.4f}",
                f"{trial['seconds']:.0f}",
            ]
            for trial in done
        ]
        states = ", ".join(f"{number} {state}" for state, number in counts.items())
        shares = ", ".join(f"{key} {percent(share)} %" for key, share in record.importance.items())
        head = ["trial", *keys, f"{record.split} {record.metric}", "seconds"]
        caption = f"{record.task}: {states} ([record](results/sweep/{file.name})). Parameter importance: {shares}."
        parts.append(f"{caption}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _typed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    return " ".join(value) if isinstance(value, list) else str(value)


def _evidence(results: Path) -> dict[str, Any]:
    return read_json_record(results / "tiny-bases.json")


def _bases(results: Path) -> str:
    rows = [
        [
            name,
            f"{base['parameters']:,}",
            f"{base['bytes'] / 1e6:.2f}",
            f"{base['trained_tokens'] / 1e6:.0f}",
            f"{base['corpus_tokens'] / 1e6:.0f}",
            f"{base['minutes']:.0f}",
            f"{base['held_out_loss']:.2f}",
            f"{base['held_out_perplexity']:.1f}",
        ]
        for name, base in _evidence(results).items()
    ]
    head = ["base", "parameters", "file, MB", "training tokens, M", "corpus tokens, M", "minutes", "held-out loss"]
    return table([*head, "perplexity"], rows)


def _fills(results: Path) -> str:
    rows = [
        [row["sentence"].replace("<mask>", "**[?]**"), ", ".join(f"{word} {p:.2f}" for word, p in row["fills"].items())]
        for row in _evidence(results)["tiny-roberta"]["fills"]
    ]
    return table(["sentence", "top five predictions"], rows, text_columns=2)


def _continuations(results: Path) -> str:
    rows = _evidence(results)["tiny-gpt2"]["continuations"]
    head = ["prompt", "greedy continuation", "sampled (top-p 0.9, temperature 0.8)"]
    return table(
        head, [[" ".join(row[key].split()) for key in ("prompt", "greedy", "sampled")] for row in rows], text_columns=3
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "sst2": _sst2,
    "e2e": _e2e,
    "label-scores": label_scores,
    "speed": speed_tables.speed,
    "speed-machines": speed_tables.speed_machines,
    "equal-work": speed_tables.equal_work,
    "roofline": speed_tables.roofline,
    "profiles": speed_tables.profiles,
    "answering": speed_tables.answering,
    "switching": speed_tables.switching,
    "grouping": _grouping,
    "sweep": _sweep,
    "lr-find": lr_find,
    "serving": serving_tables.serving,
    "restarts": serving_tables.restarts,
    "regret-batches": regret_tables.by_batch_size,
    "regret-ranks": regret_tables.by_rank,
    "regret-rates": regret_tables.rate_ratios,
    "found-rates": regret_tables.found_rates,
    "streamed-texts": serving_tables.streamed_texts,
    "text-forms": serving_tables.text_forms,
    "quantised": speed_tables.quantised,
    "answers-in": speed_tables.answers_in,
    "gpu": gpu,
    "suite": from_results(suite_tables.scores),
    "suite-texts": from_results(suite_tables.texts),
    "glue-scores": from_results(suite_tables.scores, "glue"),
    "glue-choice": from_results(suite_tables.choice, "glue"),
    "glue-guide": from_results(guide, "glue"),
    "glue-resources": from_results(suite_tables.resources, "glue"),
    "glue-storage": from_results(suite_tables.storage, "glue"),
    "damaged-input": robustness_tables.damaged,
    "malformed-requests": robustness_tables.malformed,
    "malformed-answers": robustness_tables.malformed_answers,
    "kills": robustness_tables.kills,
    "situations": robustness_tables.situations,
    "attacks": robustness_tables.attacks,
    "model-types": model_tables.model_types,
    "export-engines": export_tables.engines,
    "export-converter": export_tables.converter,
    "model-classes": model_tables.model_classes,
    "config-keys": config_keys,
    "tiny-bases": _bases,
    "tiny-fills": _fills,
    "tiny-continuations": _continuations,
    "peers": speed_tables.peers,
}


def main() -> int:
    for page in fill_pages(Path(__file__).parent.parent):
        sys.stderr.write(f"rendered {page.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
