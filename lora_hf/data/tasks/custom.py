"""Custom tasks: a config describes the task, and its rows come from the user's files.

A split is one file that `data.readers` knows, such as `<split>.csv` or `<split>.jsonl`, in the data folder or in
`<task.name>/` below it. Nothing is guessed: a class that is missing from `task.label_names`, two files for one split,
or a number instead of a text is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.data.readers import TABLE_SUFFIXES, read_rows, to_dataset
from lora_hf.data.tasks.base import Task, TextClassification
from lora_hf.data.tasks.generation import Example, TextGeneration
from lora_hf.data.tasks.row_checks import check_text, nfc, read_labels
from lora_hf.data.tasks.sources import DATA_DIR_VARIABLE, find_data_folder

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_COLUMNS = {
    "classification": (("text",), "label"),
    "regression": (("text",), "label"),
    "generation": (("prompt",), "completion"),
}
METRICS = {
    "classification": ("accuracy", "macro_f1", "matthews_correlation"),
    "regression": ("pearson", "spearmanr"),
    "generation": (),
}
LARGEST_SCORE = 1e30  # labels are float32, whose largest number is 3e38


def custom_task(config: TaskConfig) -> Task:
    """Returns the task that a config with `task.kind` describes.

    Raises:
        ConfigError: everything that is missing or inconsistent, in one message.
    """
    kind = config.kind
    assert kind is not None
    default_texts, default_label = DEFAULT_COLUMNS[kind]
    texts, label = config.text_columns or default_texts, config.label_column or default_label
    source = CustomFiles(replace(config, data_dir=None, text_columns=texts, label_column=label))
    _check(source.config)
    if kind == "generation":
        return CustomText(name=config.name, source=source, text_columns=(*texts, label), metric="e2e_nlg")
    lowest, highest = (-LARGEST_SCORE, LARGEST_SCORE) if kind == "regression" else (0.0, 0.0)
    return TextClassification(
        name=config.name,
        source=source,
        text_columns=texts,
        label_names=config.label_names or (),
        problem_type="regression" if kind == "regression" else "single_label_classification",
        metric=kind,
        best_metric=config.metric or METRICS[kind][0],
        lowest_score=lowest,
        highest_score=highest,
    )


def task_section(task: Task) -> dict[str, Any]:
    """Returns the `task` section of a config that describes `task`, without `data_dir` and `max_length`."""
    if not isinstance(task.source, CustomFiles):
        return {"name": task.name}
    section = asdict(task.source.config)
    return {key: value for key, value in section.items() if key not in ("data_dir", "max_length")}


def _check(config: TaskConfig) -> None:
    problems = []
    texts, names = config.text_columns or (), config.label_names or ()
    if not re.fullmatch(r"\w[\w.-]{0,99}", config.name):  # it also names a folder in data_dir
        problems.append(
            "task.name: expected at most 100 letters, digits, '_', '-' and '.', the first no '-' or '.', found "
            f"{config.name!r:.110}"
        )
    if len(texts) > (1 if config.kind == "generation" else 2) or len(set(texts)) < len(texts):
        expected = "one column" if config.kind == "generation" else "one or two columns"
        problems.append(f"task.text_columns: expected {expected}, found {', '.join(texts)}")
    if config.label_column in texts:
        problems.append(f"task.label_column: {config.label_column!r} is one of task.text_columns")
    elif "label" in texts and config.kind != "generation":
        problems.append("task.text_columns: a text column cannot be called 'label'; rename it")
    if config.kind == "classification" and (len(names) < 2 or len(set(map(nfc, names))) < len(names)):
        problems.append(
            "task.label_names: expected two or more different classes in the order of their ids, such as "
            f"[negative, positive], found {', '.join(names) or 'none'}"
        )
    if config.kind != "classification" and names:
        problems.append(f"task.label_names: task.kind={config.kind} has no classes; leave it out")
    metrics = METRICS[config.kind or "generation"]
    if config.metric is not None and config.metric not in metrics:
        expected = f"one of {', '.join(metrics)}" if metrics else "none, as perplexity chooses the best checkpoint"
        problems.append(f"task.metric: expected {expected}, found {config.metric}")
    if problems:
        raise ConfigError("\n  ".join([f"task.kind={config.kind}:", *problems]))


@dataclass(frozen=True)
class CustomFiles:
    """The splits of a custom task, as the `task` section of a config describes them."""

    config: TaskConfig

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        """Returns the rows and their path: the text columns under their own names, the class or score as `label`.

        Raises:
            DataError: no folder, not exactly one file, a missing column, a label that is not one of the classes.
        """
        path = self._file(split, data_dir)
        texts, label = self.config.text_columns or (), self.config.label_column or ""
        rows = read_rows(path, (*texts, label))
        if self.config.kind == "generation":
            return rows, str(path)
        return self._with_labels(rows, texts, label, path), str(path)

    def _file(self, split: str, data_dir: str | None) -> Path:
        name = self.config.name
        how_to = (
            f"Set task.data_dir=DIR or {DATA_DIR_VARIABLE}=DIR to a folder with a file {split} that ends in "
            f"{', '.join(TABLE_SUFFIXES)}, in DIR itself or in DIR/{name}."
        )
        root, setting = find_data_folder(data_dir, how_to)
        if root is None:
            raise DataError(f"{name}: no data folder is set. {how_to}")
        named = [path for folder in (root / name, root) for path in sorted(folder.glob("*")) if path.stem == split]
        files = [path for path in named if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
        if not files:
            found = f"; found {', '.join(path.name for path in named)}" if named else ""
            raise DataError(f"{name}: no file with the rows of split {split!r} in {root} ({setting}){found}. {how_to}")
        if len(files) > 1:
            raise DataError(f"{name}: split {split!r} is in {' and in '.join(map(str, files))}; keep one of them")
        return files[0]

    def _with_labels(self, rows: Dataset, texts: Sequence[str], label: str, path: Path) -> Dataset:
        import pyarrow
        from datasets import ClassLabel, Features, Value

        check_text(rows, str(path), tuple(texts))
        names = list(self.config.label_names or ())
        features = Features({column: Value("string") for column in texts})
        features["label"] = ClassLabel(names=names) if names else Value("float32")
        columns: dict[str, Any] = {column: rows.data.column(column).cast(pyarrow.string()) for column in texts}
        columns["label"] = read_labels(_class_names(rows, label), names, str(path), label, "task.label_names")
        return to_dataset(pyarrow.table(columns, schema=features.arrow_schema))


@dataclass(frozen=True, kw_only=True)
class CustomText(TextGeneration):
    """Generates a completion for a prompt. Both are used as written, without the white space around them."""

    def context(self, prompt: str) -> str:
        """Returns the prompt without surrounding white space."""
        if not prompt.strip():
            raise DataError(f"{self.name}: expected a prompt, found nothing")
        return prompt.strip()

    def _example(self, *values: Any) -> Example:
        prompt, completion = values
        if not prompt.strip():
            raise ValueError(f"{self.text_columns[0]!r} is empty; expected a prompt")
        completion = completion.strip()
        return Example(prompt.strip(), (completion,) if completion else ())

    def clean(self, text: str) -> str:
        return text.strip()


def _class_names(rows: Dataset, column: str) -> list[Any]:
    """Returns the values of a column; the ids of a file that names its classes become these names."""
    values, names = rows[column][:], getattr(rows.features[column], "names", None)
    if names is None:
        return values
    return [names[value] if value is not None and 0 <= value < len(names) else value for value in values]
