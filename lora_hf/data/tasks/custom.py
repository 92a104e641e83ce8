"""Custom tasks: a config describes the task, and its rows come from the user's files.

A split is one file that `data.readers` knows, such as `<split>.csv` or `<split>.jsonl`, in the data folder or in
`<task.name>/` below it; with `task.validation` the training file holds both splits. Nothing is guessed: a class that is
missing from `task.label_names`, two files for one split, or a number instead of a text is an error.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.data.readers import TABLE_SUFFIXES, to_dataset
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.chat import CHAT
from lora_hf.data.tasks.classification import TextClassification
from lora_hf.data.tasks.generation import TextToText
from lora_hf.data.tasks.kind import Kind, check_no_classes, read_columns, text_arrays, text_columns_of
from lora_hf.data.tasks.multi_label import LABEL_COLUMN, check_multi_label, multi_label_task, read_label_sets
from lora_hf.data.tasks.question_answering import METRICS as ANSWER_METRICS
from lora_hf.data.tasks.question_answering import check_questions_config, question_answering_task
from lora_hf.data.tasks.question_files import read_questions
from lora_hf.data.tasks.row_checks import class_names, nfc, read_labels
from lora_hf.data.tasks.row_selection import limit_rows, split_rows
from lora_hf.data.tasks.seq2seq import seq2seq_task
from lora_hf.data.tasks.sources import DATA_DIR_VARIABLE, Source, find_data_folder
from lora_hf.data.tasks.token_files import CONLL, TAGS, TOKENS, text_column
from lora_hf.data.tasks.tokens import METRICS as TAG_METRICS
from lora_hf.data.tasks.tokens import check_tokens_config, read_tokens, tokens_task

if TYPE_CHECKING:
    from datasets import Dataset

SHARD = re.compile(r"-\d{5}-of-\d{5}")  # as the hub names the parts of a split
LARGEST_SCORE = 1e30  # labels are float32, whose largest number is 3e38


def custom_task(config: TaskConfig) -> Task:
    """Returns the task that a config with `task.kind` describes.

    Raises:
        ConfigError: everything that is missing or inconsistent, in one message.
    """
    assert config.kind is not None
    kind = KINDS[config.kind]
    texts, label = config.text_columns or kind.text_columns, config.label_column or kind.label_column
    config = replace(config, data_dir=None, text_columns=texts, label_column=label)
    _check(config, kind)
    return kind.build(config, CustomFiles(config))


def task_section(task: Task) -> dict[str, Any]:
    """Returns the `task` section of a config that describes `task`, without `data_dir` and `max_length`."""
    if not isinstance(task.source, CustomFiles):
        return {"name": task.name}
    section = asdict(task.source.config)
    return {key: value for key, value in section.items() if key not in ("data_dir", "max_length")}


def _check(config: TaskConfig, kind: Kind) -> None:
    problems = []
    texts = config.text_columns or ()
    if not re.fullmatch(r"\w[\w.-]{0,99}", config.name):  # it also names a folder in data_dir
        problems.append(
            "task.name: expected at most 100 letters, digits, '_', '-' and '.', the first no '-' or '.', found "
            f"{config.name!r:.110}"
        )
    if len(texts) > kind.max_texts or len(set(texts)) < len(texts):
        expected = "one column" if kind.max_texts == 1 else "one or two columns"
        problems.append(f"task.text_columns: expected {expected}, found {', '.join(texts)}")
    if config.label_column in texts:
        problems.append(f"task.label_column: {config.label_column!r} is one of task.text_columns")
    problems += kind.check(config) + _check_keys(config, kind)
    if config.metric is not None and config.metric not in kind.metrics:
        expected = f"one of {', '.join(kind.metrics)}" if kind.metrics else "none, as perplexity chooses the checkpoint"
        problems.append(f"task.metric: expected {expected}, found {config.metric}")
    if problems:
        raise ConfigError("\n  ".join([f"task.kind={config.kind}:", *problems]))


def _check_keys(config: TaskConfig, kind: Kind) -> list[str]:
    """Returns which keys belong to other kinds only."""
    default = TaskConfig(config.name)
    others = {key: [name for name, other in KINDS.items() if key in other.keys]
              for each in KINDS.values() for key in each.keys if key not in kind.keys}  # fmt: skip
    return [
        f"task.{key}: only for task.kind={' or '.join(kinds)}; leave it out"
        for key, kinds in others.items()
        if getattr(config, key) != getattr(default, key)
    ]


@dataclass(frozen=True)
class CustomFiles:
    """The splits of a custom task, as the `task` section of a config describes them."""

    config: TaskConfig

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        """Returns the rows and their path: the text columns under their own names, the class or score as `label`.

        Raises:
            DataError: no folder, not exactly one file, a missing column, a label that is not one of the classes; or a
                file for the validation rows although `task.validation` takes them from the training file.
        """
        config, held_out = self.config, self.config.validation is not None and split == "validation"
        rows, path = self._read_file("train" if held_out else split, data_dir)
        if config.validation is not None and split in ("train", "validation"):
            self._check_one_file(data_dir)
            inputs = self._kind.inputs(config, rows)
            parts = split_rows(rows, config.validation, config.split_seed, inputs, str(path))
            rows = parts[1] if held_out else parts[0]
        if config.train_rows is not None and split == "train":
            rows = limit_rows(rows, config.train_rows, config.split_seed)
        return rows, str(path)

    @property
    def _kind(self) -> Kind:
        return KINDS[self.config.kind or "classification"]

    def _read_file(self, split: str, data_dir: str | None) -> tuple[Dataset, Path]:
        path = self.file(split, data_dir)
        return self._kind.read(self.config, path), path

    def _check_one_file(self, data_dir: str | None) -> None:
        root, _ = find_data_folder(data_dir, "")
        for path in self._named("validation", root) if root else ():
            raise DataError(
                f"task.validation={self.config.validation:g} takes validation rows from the training file, but there "
                f"is also {path}; leave task.validation out, or move that file"
            )

    def _named(self, split: str, root: Path) -> list[Path]:
        return [
            path
            for folder in (root / self.config.name, root)
            for path in sorted(folder.glob("*"))
            if path.stem == split or SHARD.fullmatch(path.stem.removeprefix(split))
        ]

    def file(self, split: str, data_dir: str | None) -> Path:
        """Returns the file of a split.

        Raises:
            DataError: no folder, or not exactly one file.
        """
        suffixes = self._kind.suffixes
        name = self.config.name
        one_file = " With task.validation=0.1 these rows come from the training file." if split == "validation" else ""
        how_to = (
            f"Set task.data_dir=DIR or {DATA_DIR_VARIABLE}=DIR to a folder with a file {split} that ends in "
            f"{', '.join(suffixes)}, in DIR itself or in DIR/{name}.{one_file}"
        )
        root, setting = find_data_folder(data_dir, how_to)
        if root is None:
            raise DataError(f"{name}: no data folder is set. {how_to}")
        named = self._named(split, root)
        files = [path for path in named if path.suffix.lower() in suffixes and path.is_file()]
        if not files:
            others = named or sorted(root.glob("*"))
            found = f"; found {', '.join(path.name for path in others[:10]) or 'nothing'}"
            raise DataError(f"{name}: no file with the rows of split {split!r} in {root} ({setting}){found}. {how_to}")
        shards = [path for path in files if path.stem != split]
        if len(shards) > 1 or any(not path.stem.endswith("-of-00001") for path in shards):
            raise DataError(
                f"{name}: split {split!r} is in parts, {', '.join(path.name for path in shards[:5])} in {root}; write "
                f"them as one file {split}{shards[0].suffix}"
            )
        if len(files) > 1:
            raise DataError(f"{name}: split {split!r} is in {' and in '.join(map(str, files))}; keep one of them")
        return files[0]


def _check_classes(config: TaskConfig) -> list[str]:
    names, problems = config.label_names or (), _check_label_column(config)
    if len(names) < 2 or len(set(map(nfc, names))) < len(names):
        problems.append(
            "task.label_names: expected two or more different classes in the order of their ids, such as "
            f"[negative, positive], found {', '.join(names) or 'none'}"
        )
    return problems


def _check_label_column(config: TaskConfig) -> list[str]:
    if config.label_column != "label" and "label" in (config.text_columns or ()):
        return ["task.text_columns: a text column cannot be called 'label'; rename it"]
    return []


def _classification(config: TaskConfig, source: Source) -> Task:
    regression = config.kind == "regression"
    return TextClassification(
        name=config.name,
        source=source,
        text_columns=config.text_columns or (),
        label_names=config.label_names or (),
        problem_type="regression" if regression else "single_label_classification",
        metric=config.kind or "",
        best_metric=config.metric or KINDS[config.kind or "classification"].metrics[0],
        lowest_score=-LARGEST_SCORE if regression else 0.0,
        highest_score=LARGEST_SCORE if regression else 0.0,
    )


def _generation(config: TaskConfig, source: Source) -> Task:
    columns = (*(config.text_columns or ()), config.label_column or "")
    return TextToText(name=config.name, source=source, text_columns=columns, metric="e2e_nlg")


def _read_labels(config: TaskConfig, path: Path) -> Dataset:
    """Returns the text columns under their own names, and the class or score as `label`."""
    import pyarrow
    from datasets import ClassLabel, Features, Value

    rows, label, names = read_columns(config, path), config.label_column or "", list(config.label_names or ())
    columns = text_arrays(config, rows, path)
    features = Features({column: Value("string") for column in columns})
    features["label"] = ClassLabel(names=names) if names else Value("float32")
    columns["label"] = read_labels(class_names(rows, label), names, str(path), label, "task.label_names")
    return to_dataset(pyarrow.table(columns, schema=features.arrow_schema))


KINDS: dict[str, Kind] = {
    "classification": Kind(
        ("text",),
        "label",
        ("accuracy", "macro_f1", "matthews_correlation"),
        _classification,
        _check_classes,
        read=_read_labels,
    ),
    "multi_label": Kind(
        ("text",),
        LABEL_COLUMN,
        ("micro_f1", "macro_f1", "mean_average_precision"),
        multi_label_task,
        lambda config: _check_classes(config) + check_multi_label(config),
        read=read_label_sets,
        keys=("label_separator", "label_columns", "thresholds"),
    ),
    "regression": Kind(
        ("text",),
        "label",
        ("pearson", "spearmanr"),
        _classification,
        lambda config: _check_label_column(config) + check_no_classes(config),
        read=_read_labels,
    ),
    "generation": Kind(("prompt",), "completion", (), _generation, max_texts=1),
    "tokens": Kind(
        (TOKENS,),
        TAGS,
        TAG_METRICS,
        tokens_task,
        check_tokens_config,
        max_texts=1,
        read=read_tokens,
        inputs=lambda config, rows: rows[text_column(text_columns_of(config)[0])][:],
        suffixes=(*TABLE_SUFFIXES, CONLL, ".txt"),
        keys=("stride",),
    ),
    "question_answering": Kind(
        ("question", "context"),
        "answers",
        ANSWER_METRICS,
        question_answering_task,
        check_questions_config,
        read=lambda config, path: read_questions(path, config.text_columns or (), config.label_column or ""),
        keys=("stride", "null_score_threshold"),
    ),
    "seq2seq": Kind(
        ("source",), "target", (), seq2seq_task, max_texts=1, keys=("prefix", "source_lang", "target_lang")
    ),
    "chat": CHAT,
}
