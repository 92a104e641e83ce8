"""The eight GLUE tasks as rows of one table, and the rule-made stand-in for a machine that has none of their data.

Columns, label names and splits are those of `nyu-mll/glue` on the hub; the original distribution's file and column
names are those of the files that https://gluebenchmark.com/tasks hands out. The metric that chooses the best
checkpoint is the one the LoRA paper reports (arXiv 2106.09685, table 2).
"""

from __future__ import annotations

from lora_hf.data.synthetic import rule_sentiment
from lora_hf.data.tasks.base import TextClassification
from lora_hf.data.tasks.sources import Embedded, LocalOrHub, TabSeparated

_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_MNLI_SPLITS = {
    "train": "train",
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
    "test_matched": "test_matched",
    "test_mismatched": "test_mismatched",
}


def _glue(
    name: str,
    label_names: tuple[str, ...],
    columns: dict[str, str],
    original_folder: str,
    original_label: str = "label",
    original_header: tuple[str, ...] = (),
    best_metric: str = "accuracy",
    splits: dict[str, str] = _SPLITS,
) -> TextClassification:
    """`columns` maps the hub's text columns to the original files'."""
    originals = TabSeparated(
        files={split: f"{original_folder}/{stem}.tsv" for split, stem in splits.items()},
        columns={**columns, "label": original_label},
        label_names=label_names,
        header=original_header,
    )
    return TextClassification(
        name=name,
        source=LocalOrHub(folder=f"glue/{name}", hub_id="nyu-mll/glue", hub_config=name, originals=originals),
        text_columns=tuple(columns),
        label_names=label_names,
        problem_type="single_label_classification" if label_names else "regression",
        evaluation_splits=tuple(split for split in splits if split.startswith("validation")),
        metric=name,
        best_metric=best_metric,
    )


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}

GLUE = (
    _glue("cola", ("unacceptable", "acceptable"), {"sentence": "sentence"}, "CoLA",
          original_header=("source", "label", "star", "sentence"), best_metric="matthews_correlation"),
    _glue("sst2", ("negative", "positive"), {"sentence": "sentence"}, "SST-2"),
    _glue("mrpc", ("not_equivalent", "equivalent"), {"sentence1": "#1 String", "sentence2": "#2 String"}, "MRPC",
          original_label="Quality"),
    _glue("qqp", ("not_duplicate", "duplicate"), {"question1": "question1", "question2": "question2"}, "QQP",
          original_label="is_duplicate"),
    _glue("stsb", (), _PAIR, "STS-B", original_label="score", best_metric="pearson"),
    _glue("mnli", ("entailment", "neutral", "contradiction"), {"premise": "sentence1", "hypothesis": "sentence2"},
          "MNLI", original_label="gold_label", splits=_MNLI_SPLITS),
    _glue("qnli", _ENTAILMENT, {"question": "question", "sentence": "sentence"}, "QNLI"),
    _glue("rte", _ENTAILMENT, _PAIR, "RTE"),
)  # fmt: skip

RULE_SENTIMENT = TextClassification(
    name="rule-sentiment",
    source=Embedded(rule_sentiment),
    text_columns=("sentence",),
    label_names=("negative", "positive"),
    metric="sst2",
    best_metric="accuracy",
)
