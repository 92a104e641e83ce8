"""A person's own data: a task that the config describes, with rows from files of their own.

The files of a split are `<split>.parquet`, `<split>.csv` (UTF-8, commas, a header) or `<split>.jsonl` (an object a
line), in the data folder or in `<task.name>/` below it. Nothing is guessed: a class that `task.label_names` does not
name, two files for one split or a number where text belongs is an error.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError, DataError, did_you_mean
from lora_hf.data.tasks.base import Task, TextClassification
from lora_hf.data.tasks.generation import Example, TextGeneration
from lora_hf.data.tasks.raw_formats import read_csv
from lora_hf.data.tasks.sources import (
    DATA_DIR_VARIABLE,
    check_columns,
    check_text,
    decode,
    in_memory,
    named_folder,
    read_parquet,
)

if TYPE_CHECKING:
    import pyarrow
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
LARGEST_SCORE = 1e30  # far inside of fp32, which the loss of a regression squares numbers in


def custom_task(config: TaskConfig) -> Task:
    """The task that a config with `task.kind` describes.

    Raises:
        ConfigError: all that is missing or does not fit, in one message.
    """
    kind = config.kind
    assert kind is not None
    usual_texts, usual_label = DEFAULT_COLUMNS[kind]
    texts, label = config.text_columns or usual_texts, config.label_column or usual_label
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
    """The keys of a config's `task` section that make this task again: for one of ours its name alone."""
    if not isinstance(task.source, CustomFiles):
        return {"name": task.name}
    section = asdict(task.source.config)
    return {key: value for key, value in section.items() if key not in ("data_dir", "max_length")}


def _check(config: TaskConfig) -> None:
    problems = []
    texts, names = config.text_columns or (), config.label_names or ()
    if not re.fullmatch(r"[\w.-]+", config.name):
        problems.append(f"task.name: expected letters, digits, '_', '-' and '.', found {config.name!r}")
    most = 1 if config.kind == "generation" else 2
    if len(texts) > most or len(set(texts)) < len(texts):
        problems.append(f"task.text_columns: expected {'one column' if most == 1 else 'one or two columns'}, "
                        f"found {', '.join(texts)}")  # fmt: skip
    if config.label_column in texts:
        problems.append(f"task.label_column: {config.label_column!r} is one of task.text_columns")
    elif "label" in texts and config.kind != "generation":
        problems.append("task.text_columns: a column called 'label' cannot be a text here; rename it")
    if config.kind == "classification" and (len(names) < 2 or len(set(names)) < len(names)):
        problems.append(
            "task.label_names: expected the classes, each once and in the order of their numbers, such as "
            f"[negative, positive], found {', '.join(names) or 'none'}"
        )
    if config.kind != "classification" and names:
        problems.append(f"task.label_names: task.kind={config.kind} has no classes; leave it out")
    known = METRICS[config.kind or "generation"]
    if config.metric is not None and config.metric not in known:
        expected = f"one of {', '.join(known)}" if known else "none, for perplexity chooses the best checkpoint"
        problems.append(f"task.metric: expected {expected}, found {config.metric}")
    if problems:
        raise ConfigError("\n  ".join([f"task.kind={config.kind}:", *problems]))


@dataclass(frozen=True)
class CustomFiles:
    """The splits of a person's own data, as the `task` section of a config describes them; see the top of the file."""

    config: TaskConfig

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        """Returns the rows and where they came from: the texts under their own names, the class or score as `label`.

        Raises:
            DataError: no folder or no file, two files, a column is missing, a label that is not among the classes.
        """
        path = self._file(split, data_dir)
        rows = READERS[path.suffix](path)
        texts, label = self.config.text_columns or (), self.config.label_column or ""
        check_columns(rows.column_names, (*texts, label), str(path))
        if self.config.kind == "generation":
            return rows.select_columns([*texts, label]), str(path)
        return self._labelled(rows, texts, label, path), str(path)

    def _file(self, split: str, data_dir: str | None) -> Path:
        folder, setting = named_folder(data_dir)
        name = self.config.name
        how = (
            f"Set task.data_dir=DIR (--data-dir DIR) or {DATA_DIR_VARIABLE}=DIR to a folder with DIR/{split}.csv, "
            f"DIR/{split}.jsonl or DIR/{split}.parquet; DIR/{name}/{split}.csv and so on will do as well."
        )
        if not folder:
            raise DataError(f"{name}: no folder with its data is named. {how}")
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise DataError(f"{setting}={folder} is not a folder. {how}")
        places = [root / part / f"{split}{ending}" for part in (name, "") for ending in READERS]
        found = [place for place in places if place.is_file()]
        if not found:
            raise DataError(f"{name}: no file with the rows of split {split!r} in {root} ({setting}). {how}")
        if len(found) > 1:
            raise DataError(f"{name}: split {split!r} is in {' and in '.join(map(str, found))}; keep one of them")
        return found[0]

    def _labelled(self, rows: Dataset, texts: Sequence[str], label: str, path: Path) -> Dataset:
        import pyarrow
        from datasets import ClassLabel, Features, Value

        names = list(self.config.label_names or ())
        for column in texts:
            check_text(rows, str(path), (column,))
        features = Features({column: Value("string") for column in texts})
        features["label"] = ClassLabel(names=names) if names else Value("float32")
        values = _written(rows, label)
        ids = self._numbers(values, label, path)
        columns: dict[str, Any] = {column: rows.data.column(column).cast(pyarrow.string()) for column in texts}
        return in_memory(pyarrow.table({**columns, "label": ids}, schema=features.arrow_schema))

    def _numbers(self, values: Sequence[Any], label: str, path: Path) -> list[float]:
        """The class ids, or the scores, of labels as they are written."""
        numbers = {_key(value): self._number(value) for value in values}
        wrong = next((row for row, value in enumerate(values) if numbers[_key(value)] is None), None)
        if wrong is not None:
            names = self.config.label_names or ()
            expected = f"one of task.label_names ({', '.join(names)})" if names else "a number"
            counts = Counter(map(str, values)).most_common(10)
            found = f"; the column holds {', '.join(f'{name} ({count})' for name, count in counts)}" if names else ""
            near = did_you_mean(str(values[wrong]), names)
            raise DataError(
                f"{path}: row {wrong} (counting from 0) has the label {values[wrong]!r:.100} in column {label!r}; "
                f"expected {expected}{near}{found}"
            )
        return [number for value in values if (number := numbers[_key(value)]) is not None]

    def _number(self, value: Any) -> float | None:
        names = self.config.label_names
        if not names:
            try:
                return None if isinstance(value, bool) or value is None else float(value)
            except (TypeError, ValueError):
                return None
        said = str(value).lower() if isinstance(value, bool) else str(value)
        if said in names:
            return names.index(said)
        # Where the classes are called 1 to 5, a 0 is no class id but a mistake.
        counted = isinstance(value, (int, str)) and said.isdecimal() and not any(name.isdecimal() for name in names)
        return int(said) if counted and int(said) < len(names) else None


@dataclass(frozen=True, kw_only=True)
class CustomText(TextGeneration):
    """A text for a text: the prompt as it is written, and the completion on one line."""

    def check(self, rows: Dataset, split: str, where: str) -> None:
        check_text(rows, where, self.text_columns)
        super().check(rows, split, where)

    def context(self, prompt: str) -> str:
        """Returns the prompt without the white space around it."""
        if not prompt.strip():
            raise DataError(f"{self.name}: expected a prompt, found nothing")
        return prompt.strip()

    def _example(self, *values: Any) -> Example:
        prompt, completion = values
        if not prompt.strip():
            raise ValueError(f"{self.text_columns[0]!r} is empty; expected a prompt")
        # A text is written and scored on one line.
        completion = " ".join(completion.split())
        return Example(prompt.strip(), (completion,) if completion else ())


def _written(rows: Dataset, column: str) -> list[Any]:
    """The values of a column; class ids of a file that names its classes by those names."""
    values, names = rows[column][:], getattr(rows.features[column], "names", None)
    if names is None:
        return values
    return [names[value] if value is not None and 0 <= value < len(names) else value for value in values]


def _key(value: Any) -> tuple[type, str]:
    return type(value), str(value)


def _csv(path: Path) -> Dataset:
    import pyarrow

    header, rows = read_csv(path)
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: the header names {', '.join(map(repr, repeated))} more than once; rename one")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    return in_memory(pyarrow.table({name: pyarrow.array(cells, pyarrow.string()) for name, cells in columns.items()}))


def _json_lines(path: Path) -> Dataset:
    import pyarrow

    rows = []
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not a JSON object: {error}") from error
        if not isinstance(row, Mapping):
            raise DataError(f'{path}, line {number}: expected an object such as {{"text": ...}}, found {line:.50}')
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return in_memory(pyarrow.table({name: _column(path, name, [row.get(name) for row in rows]) for name in names}))


def _column(path: Path, name: str, values: list[Any]) -> pyarrow.Array:
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        raise DataError(f"{path}: {name!r} does not hold one kind of value: {error}") from error


READERS = {".parquet": read_parquet, ".csv": _csv, ".jsonl": _json_lines}
