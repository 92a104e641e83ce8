"""The table of classifiers against PEFT with the Trainer."""

from __future__ import annotations

from pathlib import Path

from lora_hf.core.formatting import percent, table
from lora_hf.core.records import read_json_record


def label_scores(results: Path) -> str:
    """Each score of each task, on both sides."""
    record = read_json_record(results / "kinds" / "labels.json")
    rows = [
        [
            found["task"],
            metric.replace("_", " "),
            percent(value),
            percent(found["peft"][metric]),
            percent(found["peft_from_zero"][metric]) if "peft_from_zero" in found else "-",
            f"{found['rows']['train']:,}",
            f"{found['rows']['validation']:,}",
            f"{found['config']['train']['epochs']:g}",
        ]
        for found in record["compared"]
        for metric, value in found["ours"].items()
    ]
    head = ["task", "score", "lora_hf, %", "PEFT, %", "PEFT, head from zero, %", "training rows"]
    return table([*head, "validation rows", "epochs"], rows, text_columns=2)
