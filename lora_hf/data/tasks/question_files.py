"""The files of question answering: SQuAD's nested JSON, and flat rows of question, context and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError
from lora_hf.core.parsing import parse_json
from lora_hf.data.readers import read_rows, read_text, read_texts, to_dataset
from lora_hf.data.tasks.row_checks import check_any, check_filled, wrong_value

if TYPE_CHECKING:
    from datasets import Dataset

ANSWERS, STARTS = "answer_texts", "answer_starts"  # the columns of a task's rows


def read_questions(path: Path, columns: Sequence[str], label: str) -> Dataset:
    """Returns question and context under the names in `columns`, the texts of the right answers and their starts.

    Args:
        label: the column of the answers of a flat file: `{text: [...], answer_start: [...]}`, or a list of objects with
            `text` and `answer_start`; an empty one if there is no answer.

    Raises:
        DataError: as `read_rows`; also the first row that does not fit, with what was expected and found.
    """
    import pyarrow

    nested = _nested(path)
    if nested is None:
        names = (*columns, label)
        rows = read_rows(path, names)
        values = list(zip(*(rows[name][:] for name in names), strict=True))
    else:
        values, names = list(_squad_rows(nested, path)), ("question", "context", "answers")
    check_any(values, path)
    answers = [_check_row(value, names, path, row) for row, value in enumerate(values)]
    text = pyarrow.string()
    types = (text, text, pyarrow.list_(text), pyarrow.list_(pyarrow.int64()))
    table = {
        columns[0]: [question for question, _, _ in values],
        columns[1]: [context for _, context, _ in values],
        ANSWERS: [texts for texts, _ in answers],
        STARTS: [starts for _, starts in answers],
    }
    return to_dataset(pyarrow.table(table, schema=pyarrow.schema(zip(table, types, strict=True))))


def read_inputs(path: Path, columns: Sequence[str]) -> dict[str, list]:
    """Returns the questions and contexts of a file to answer, SQuAD's or a flat one.

    Raises:
        DataError: as `read_texts`.
    """
    nested = _nested(path)
    if nested is None:
        return read_texts(path, columns)
    rows = list(_squad_rows(nested, path))
    check_any(rows, path)
    for row, (question, context, _) in enumerate(rows):
        _check_texts((question, context), ("question", "context"), path, row)
    return {column: [row[index] for row in rows] for index, column in enumerate(columns)}


def _nested(path: Path) -> list[Any] | None:
    """Returns the `data` of a file in SQuAD's format; None for any other file.

    Raises:
        DataError: as `read_text`; also JSON that is nested too deeply or repeats a key.
    """
    if path.suffix.lower() != ".json":
        return None
    text = read_text(path)
    if not text.lstrip().startswith("{"):
        return None
    try:
        content = parse_json(text, limit=None)
    except json.JSONDecodeError:
        return None  # perhaps JSON lines; their reader explains what is wrong
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    data = content.get("data")
    return data if isinstance(data, list) else None


def _squad_rows(articles: list[Any], path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yields question, context and answers; one without an answer may name plausible ones, which are none."""
    for number, article in enumerate(articles):
        where = f"{path}: data[{number}]"
        for index, paragraph in enumerate(_list(article, "paragraphs", where)):
            inside = f"{where}.paragraphs[{index}]"
            for question in _list(paragraph, "qas", inside):
                if not isinstance(question, dict):
                    raise DataError(f"{inside}.qas: expected objects with question and answers, found {question!r:.80}")
                answers = [] if question.get("is_impossible") is True else question.get("answers")
                yield question.get("question"), paragraph.get("context"), answers


def _list(value: Any, key: str, where: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{where}: expected an object with a list {key!r}, as in SQuAD's files, found {value!r:.80}")
    return found


def _check_row(value: tuple[Any, Any, Any], names: Sequence[str], path: Path, row: int) -> tuple[list[str], list[int]]:
    """Returns the texts and the starts of a row's answers."""
    question, context, answers = value
    _check_texts((question, context), names, path, row)
    texts, starts = _answers(answers, names[2], path, row)
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise wrong_value(path, row, names[2], "answers that are text", f"{text!r:.100}")
        found = context[start : start + len(text)] if isinstance(start, int) and start >= 0 else None
        if found != text:
            place = context.find(text)
            hint = f"the context has it at {place}" if place >= 0 else "it is not in the context"
            expected = f"the answer {text!r:.80} at its answer_start {start}, counted in characters"
            raise wrong_value(path, row, names[2], expected, f"{found!r:.80} there; {hint}")
    return texts, starts


def _answers(answers: Any, name: str, path: Path, row: int) -> tuple[list[Any], list[Any]]:
    if isinstance(answers, dict) and isinstance(answers.get("text"), list):
        texts, starts = answers["text"], answers.get("answer_start")
        if isinstance(starts, list) and len(starts) == len(texts):
            return texts, starts
    elif isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        return [answer.get("text") for answer in answers], [answer.get("answer_start") for answer in answers]
    expected = "an object with the lists text and answer_start, of one length, or a list of objects with these keys"
    raise wrong_value(path, row, name, expected, f"{answers!r:.100}")


def _check_texts(values: Sequence[Any], names: Sequence[str], path: Path, row: int) -> None:
    for text, name in zip(values, names, strict=False):
        check_filled(text, path, row, name)
