"""The files of tokens tasks: CoNLL columns, tokens with a tag each, or a text with the spans in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError, did_you_mean
from lora_hf.data.readers import read_lines, read_rows, read_texts, to_dataset
from lora_hf.data.tasks.row_checks import LONGEST_TEXT, check_any, check_filled, class_names, nfc, wrong_value
from lora_hf.data.tasks.words import Words, join_words, split_words, tag_spans

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

TOKENS, TAGS, TEXT, SPANS = "tokens", "tags", "text", "spans"  # the columns by default, of the two forms of a row
STARTS, ENDS = "starts", "ends"  # of the words
CONLL = ".conll"


def read_tagged_rows(path: Path, column: str, label: str, names: Sequence[str]) -> Dataset:
    """Returns rows with a text, called `column` or `text`, the `starts` and `ends` of its words, and the ids `tags`.

    Args:
        column: of lists of tokens, or of texts.
        label: the column with a tag for each token, or with the spans of a text: objects with start, end and label. In
            a CoNLL file the number of the column, counting from 0; by default the last one.
        names: the tags in the order of their ids.

    Raises:
        DataError: as `read_rows`; also the first row that does not fit, with what was expected and found.
    """
    import pyarrow

    rows = list(_read(path, column, label, names))
    check_any(rows, path)
    name, numbers = text_column(column), pyarrow.list_(pyarrow.int32())
    columns = {
        name: [words.text for words, _ in rows],
        STARTS: [words.starts for words, _ in rows],
        ENDS: [words.ends for words, _ in rows],
        TAGS: [tags for _, tags in rows],
    }
    schema = pyarrow.schema({name: pyarrow.string(), STARTS: numbers, ENDS: numbers, TAGS: numbers})
    return to_dataset(pyarrow.table(columns, schema=schema))


def read_untagged_rows(path: Path, column: str) -> dict[str, list]:
    """Returns the rows of a file to answer as `read_tagged_rows`, without tags; the words of a text are found later.

    Raises:
        DataError: as `read_rows`; also no rows, or one without words.
    """
    name = text_column(column)
    if path.suffix.lower() == CONLL:
        words = [join_words(tokens) for tokens, _, _ in _read_conll(path, None)]
    elif path.suffix.lower() == ".txt":
        return read_texts(path, (name,))
    else:
        rows = read_rows(path, (), optional=dict.fromkeys((column, name)))
        if column not in rows.column_names or _holds_text(rows, column):
            return read_texts(path, (name,))
        words = [join_words(_checked_tokens(tokens, path, row, column)) for row, tokens in enumerate(rows[column][:])]
    check_any(words, path)
    return {name: [each.text for each in words], STARTS: [each.starts for each in words], ENDS: [w.ends for w in words]}


def text_column(column: str) -> str:
    """Returns what the text of a row is called, whose column in the files is `column`."""
    return TEXT if column == TOKENS else column


def _read(path: Path, column: str, label: str, names: Sequence[str]) -> Iterator[tuple[Words, list[int]]]:
    tag_ids = {nfc(name): index for index, name in enumerate(names)}
    if path.suffix.lower() in (CONLL, ".txt"):
        number = int(label) if label.isdecimal() else -1
        for tokens, tags, lines in _read_conll(path, number):
            found = [_tag_id(tag, tag_ids, f"{path}, line {line}", "") for tag, line in zip(tags, lines, strict=True)]
            yield join_words(tokens), found
        return
    rows = read_rows(path, (), optional=dict.fromkeys((column, label, TEXT, SPANS)))
    if column == TOKENS and TOKENS not in rows.column_names and {TEXT, SPANS} <= {*rows.column_names}:
        column, label = TEXT, SPANS
    if not {column, label} <= {*rows.column_names}:
        read_rows(path, (column, label))  # raises
    values, labels = rows[column][:], class_names(rows, label)
    if _holds_text(rows, column):
        yield from _from_spans(path, values, labels, column, label, tag_ids)
        return
    for row, (value, tags) in enumerate(zip(values, labels, strict=True)):
        tokens = _checked_tokens(value, path, row, column)
        if not isinstance(tags, list) or len(tags) != len(tokens):
            found = f"{len(tags)} tags" if isinstance(tags, list) else repr(tags)
            raise wrong_value(path, row, label, f"a list of {len(tokens)} tags, one for each token", f"{found:.100}")
        where = f"{path}: row {row} (counting from 0)"
        yield join_words(tokens), [_tag_id(tag, tag_ids, where, f" in column {label!r}") for tag in tags]


def _holds_text(rows: Dataset, column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in ("string", "large_string")


def _checked_tokens(tokens: Any, path: Path, row: int, column: str) -> list[str]:
    if not isinstance(tokens, list) or not tokens:
        raise wrong_value(path, row, column, "a list of tokens, at least one", f"{tokens!r:.100}")
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise wrong_value(path, row, column, "tokens that are text, without empty ones", f"{token!r:.100}")
    if sum(map(len, tokens)) > LONGEST_TEXT:
        raise wrong_value(
            path, row, column, f"tokens of at most {LONGEST_TEXT:,} characters together", f"{len(tokens)}"
        )
    return tokens


def _from_spans(
    path: Path, texts: Sequence[Any], labels: Sequence[Any], column: str, label: str, tag_ids: dict[str, int]
) -> Iterator[tuple[Words, list[int]]]:
    kinds = {name[2:] for name in tag_ids if name.startswith("B-") and f"I-{name[2:]}" in tag_ids}
    inexact: list[tuple[int, str]] = []
    for row, (text, spans) in enumerate(zip(texts, labels, strict=True)):
        check_filled(text, path, row, column)
        words = split_words(text)
        tags, problems = tag_spans(words, _checked_spans(spans, text, kinds, path, row, label))
        inexact += [(row, problem) for problem in problems]
        yield words, [tag_ids[tag] for tag in tags]
    if inexact:
        _log.warning(
            "%s: tags cover whole words, but %d spans begin or end inside a word; the first is in row %d (counting "
            "from 0): %s",
            path, len(inexact), *inexact[0],
        )  # fmt: skip


def _checked_spans(
    spans: Any, text: str, kinds: set[str], path: Path, row: int, label: str
) -> list[tuple[int, int, str]]:
    if not isinstance(spans, list):
        raise wrong_value(path, row, label, "a list of objects with start, end and label", f"{spans!r:.100}")
    found = []
    for span in spans:
        values = dict(span) if isinstance(span, dict) else {}
        start, end, kind = values.get("start"), values.get("end"), values.get("label", values.get("type"))
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
            expected = f"spans with 0 <= start < end <= {len(text)}, the length of the text"
            raise wrong_value(path, row, label, expected, f"{span!r:.100}")
        if nfc(str(kind)) not in kinds:
            expected = f"one of the types in task.label_names ({', '.join(sorted(kinds))})"
            raise wrong_value(path, row, label, expected, f"{kind!r:.100}{did_you_mean(str(kind), sorted(kinds))}")
        found.append((start, end, nfc(str(kind))))
    found.sort()
    for (_, end, _), (start, *_) in pairwise(found):
        if start < end:
            raise wrong_value(
                path, row, label, "spans that do not overlap", f"one that begins at {start}, before {end}"
            )
    return found


def _tag_id(tag: Any, tag_ids: dict[str, int], where: str, column: str) -> int:
    known = tag_ids.get(nfc(str(tag)))
    if known is None and isinstance(tag, int) and not isinstance(tag, bool) and 0 <= tag < len(tag_ids):
        known = tag  # an id, as data sets of the hub hold
    if known is None:
        plain = "; for tags that mark no spans, such as parts of speech, set task.metric: accuracy"
        raise DataError(
            f"{where} has the tag {tag!r:.100}{column}; expected one of task.label_names ({', '.join(tag_ids)})"
            f"{did_you_mean(str(tag), tag_ids)}{plain if '-' not in str(tag) else ''}"
        )
    return known


def _read_conll(path: Path, column: int | None) -> Iterator[tuple[list[str], list[str], list[int]]]:
    """Yields the tokens of each sentence, their tags from one column, and their lines; without `column` no tags."""
    tokens: list[str] = []
    tags: list[str] = []
    numbers: list[int] = []
    width = 0
    for number, line in enumerate([*read_lines(path), ""], start=1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if tokens:
                yield tokens, tags, numbers
            tokens, tags, numbers = [], [], []
            continue
        cells = line.split("\t") if "\t" in line else re.split(r" +", line.strip())
        width = width or len(cells)
        least = 1 if column is None else max(2, column + 1)
        if len(cells) != width or width < least or not all(cell.strip() for cell in cells):
            expected = f"{width} columns, as in the first line" if width >= least else f"at least {least} columns"
            raise DataError(
                f"{path}, line {number}: expected a token and its tag in {expected}, separated by spaces or a tab, "
                f"found {line!r:.100}"
            )
        tokens.append(cells[0].strip())
        tags.append("" if column is None else cells[column].strip())
        numbers.append(number)
