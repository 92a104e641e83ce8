"""The eight GLUE tasks, and `rule-sentiment`, which needs no data.

Columns, label names and splits are those of `nyu-mll/glue` on the hub, the names of the raw files and of their columns
those of https://gluebenchmark.com/tasks. The best checkpoint is chosen by the metric that the LoRA paper reports
(arXiv 2106.09685, Table 2).
"""

from __future__ import annotations

from lora_hf.data.synthetic import rule_sentiment
from lora_hf.data.tasks.classification import TextClassification
from lora_hf.data.tasks.raw_formats import TabSeparated
from lora_hf.data.tasks.sources import Bundled, LocalOrHub

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
    raw_folder: str,
    raw_label: str = "label",
    raw_header: tuple[str, ...] = (),
    best_metric: str = "accuracy",
    splits: dict[str, str] = _SPLITS,
) -> TextClassification:
    """`columns` maps the hub's text columns to those of the raw files."""
    raw_files = TabSeparated(
        files={split: (f"{raw_folder}/{stem}.tsv",) for split, stem in splits.items()},
        columns={**columns, "label": raw_label},
        label_names=label_names,
        header=raw_header,
    )
    return TextClassification(
        name=name,
        source=LocalOrHub(folder=f"glue/{name}", hub_id="nyu-mll/glue", hub_config=name, raw_files=raw_files),
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
          raw_header=("source", "label", "star", "sentence"), best_metric="matthews_correlation"),
    _glue("sst2", ("negative", "positive"), {"sentence": "sentence"}, "SST-2"),
    _glue("mrpc", ("not_equivalent", "equivalent"), {"sentence1": "#1 String", "sentence2": "#2 String"}, "MRPC",
          raw_label="Quality"),
    _glue("qqp", ("not_duplicate", "duplicate"), {"question1": "question1", "question2": "question2"}, "QQP",
          raw_label="is_duplicate"),
    _glue("stsb", (), _PAIR, "STS-B", raw_label="score", best_metric="pearson"),
    _glue("mnli", ("entailment", "neutral", "contradiction"), {"premise": "sentence1", "hypothesis": "sentence2"},
          "MNLI", raw_label="gold_label", splits=_MNLI_SPLITS),
    _glue("qnli", _ENTAILMENT, {"question": "question", "sentence": "sentence"}, "QNLI"),
    _glue("rte", _ENTAILMENT, _PAIR, "RTE"),
)  # fmt: skip

RULE_SENTIMENT = TextClassification(
    name="rule-sentiment",
    source=Bundled(rule_sentiment),
    text_columns=("sentence",),
    label_names=("negative", "positive"),
    metric="sst2",
    best_metric="accuracy",
)
