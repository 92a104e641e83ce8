"""One reader for every format and every verb: what users' programs write is read as written, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import DataError
from lora_hf.data.readers import TABLE_SUFFIXES, read_rows, read_texts, read_texts_of_adapters
from lora_hf.data.tasks.custom import KINDS, custom_task
from lora_hf.data.tasks.generation import TextGeneration
from lora_hf.data.tasks.label_names import infer_label_names
from tests.support.split_files import columns, message, write_text

TASK = TaskConfig("mine", kind="classification", label_names=("neg", "pos"))
ROWS = {"text": ["a", "b"], "label": ["neg", "pos"]}
Row = dict[str, Any]


def _quoted(rows: list[Row], separator: str, end: str = "\n") -> str:
    names = list(rows[0])
    cells = [names, *([row[name] for name in names] for row in rows)]
    return "".join(separator.join('"' + cell.replace('"', '""') + '"' for cell in line) + end for line in cells)


def _json_lines(rows: list[Row], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


WRITERS: dict[str, Callable[[list[Row]], str]] = {
    ".csv": lambda rows: _quoted(rows, ","),
    ".tsv": lambda rows: _quoted(rows, "\t"),
    ".jsonl": _json_lines,
    ".json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1),
}


def write_rows(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
        return path
    return write_text(path, WRITERS[path.suffix](rows))


TEXTS = {
    "plain": "good film",
    "commas and quotes": 'good, "very" good',
    "a tab": "good\tfilm",
    "a line feed": "good\nfilm",
    "CRLF": "good\r\nfilm",
    "a carriage return": "good\rfilm",
    "line separators of Unicode": "good\u2028film\u2029a\x85b\x0bc\x0cd\x1ce",
    "a header": "text,label",
    "null": "null",
    "a number": "007",
    "a BOM inside": "good\ufefffilm",
    "a million characters": "a" * 1_000_000,
    "beyond the BMP": "good 🎬",
}


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_arrives_as_written(text: str, suffix: str, tmp_path: Path) -> None:
    rows = [{"text": text, "label": "pos"}, {"text": "bad", "label": "neg"}]
    path = write_rows(tmp_path / f"train{suffix}", rows)
    assert columns(TASK, tmp_path) == {"text": [text, "bad"], "label": [1, 0]}
    assert read_texts(path, ("text",)) == {"text": [text, "bad"]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [*WRITERS, ".txt"])
def test_encodings(suffix: str, encoding: str, tmp_path: Path) -> None:
    text = "gut, süß\n" if suffix == ".txt" else WRITERS[suffix]([{"text": "gut, süß"}])
    path = write_text(tmp_path / f"rows{suffix}", text.encode(encoding))
    if encoding.endswith("e"):  # no mark
        with pytest.raises(DataError, match=r"line 1: .*UTF-16.*save the file as UTF-8|not UTF-8"):
            read_texts(path, ("text",))
    else:
        assert read_texts(path, ("text",)) == {"text": ["gut, süß"]}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_ends_of_lines(end: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "neg"}, {"text": "b", "label": "pos"}]
    for name, text in {"a.csv": _quoted(rows, ",", end), "a.tsv": f"text\tlabel{end}a\tneg{end}b\tpos"}.items():
        assert read_texts(write_text(tmp_path / name, text), ("text",)) == {"text": ["a", "b"]}
    assert read_texts(write_text(tmp_path / "a.jsonl", _json_lines(rows, end)), ("text",)) == {"text": ["a", "b"]}
    assert read_texts(write_text(tmp_path / "a.txt", f"a{end}b{end}"), ("text",)) == {"text": ["a", "b"]}


def test_one_text_a_line(tmp_path: Path) -> None:
    """Only line feeds end a line, as for `wc` and editors, in a file that has one."""
    lines = ["one\u2028two\x85three\x1cfour", '"quoted"', " spaces ", "50 %\r60 %", "text"]
    assert read_texts(write_text(tmp_path / "a.txt", "\n".join(lines) + "\n"), ("text",)) == {"text": lines}


TABLES = {
    "empty columns at the end": "text,label,,\na,neg,,\nb,pos,,\n",
    "rows without the empty columns": "text,label,,\na,neg\nb,pos,\n",
    "empty cells beyond the header": "text,label\na,neg,,,\nb,pos\n",
    "an index without a name": ",text,label\n0,a,neg\n1,b,pos\n",
    "a repeated column that nobody reads": "x,text,x,label\n1,a,2,neg\n1,b,2,pos\n",
    "empty lines": "\ntext,label\n\na,neg\n\n\nb,pos\n\n",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_of_spreadsheets(table: str, tmp_path: Path) -> None:
    write_text(tmp_path / "train.csv", table)
    assert columns(TASK, tmp_path) == {"text": ["a", "b"], "label": [0, 1]}


def test_columns_are_found_by_their_name(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.CSV", "cafe\u0301,x\ngood,1\n")
    assert read_texts(path, ("caf\xe9",)) == {"caf\xe9": ["good"]}
    assert read_texts(path, ("prompt",), {"prompt": ("question", "x")}) == {"prompt": ["1"]}
    assert read_rows(path, ("x",), optional=("y",)).column_names == ["x"]


def test_a_column_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", '{"text": "a", "x": 1}\n{"text": "b", "x": ["y"]}\n')
    assert read_texts(path, ("text",)) == {"text": ["a", "b"]}


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
@pytest.mark.parametrize("composed", [True, False])
def test_labels_in_either_unicode_form(composed: bool, suffix: str, tmp_path: Path) -> None:
    forms = ("caf\xe9", "cafe\u0301")
    task = TaskConfig("mine", kind="classification", label_names=("bar", forms[composed]))
    write_rows(
        tmp_path / f"train{suffix}", [{"text": "a", "label": forms[not composed]}, {"text": "b", "label": "bar"}]
    )
    assert columns(task, tmp_path)["label"] == [1, 0]


def test_categories_of_pandas(tmp_path: Path) -> None:
    table = pandas.DataFrame({"text": ["a", "b"], "label": ["neg", "pos"]}).astype("category")
    table.to_parquet(tmp_path / "train.parquet")
    assert columns(TASK, tmp_path) == {"text": ["a", "b"], "label": [0, 1]}


def test_texts_as_polars_writes_them(tmp_path: Path) -> None:
    views = {name: pyarrow.array(values, pyarrow.string_view()) for name, values in ROWS.items()}
    pyarrow.parquet.write_table(pyarrow.table(views), tmp_path / "train.parquet")
    assert columns(TASK, tmp_path) == {"text": ["a", "b"], "label": [0, 1]}


def test_a_split_as_the_hub_names_its_file(tmp_path: Path) -> None:
    for number, names in ((1, ["train-00000-of-00001"]), (2, ["train-00000-of-00002", "train-00001-of-00002"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            pyarrow.parquet.write_table(pyarrow.table(ROWS), folder / f"{name}.parquet")
    assert columns(TASK, tmp_path / "1") == {"text": ["a", "b"], "label": [0, 1]}
    found = message(TASK, tmp_path / "2")
    assert "in parts, train-00000-of-00002.parquet, train-00001" in found
    assert "as one file train.parquet" in found


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("text,label\n", "expected two or more classes in column 'label', found none in 0 rows"),
        ("text,label\na,pos\nb,pos\n", "expected two or more classes in column 'label', found pos in 2 rows"),
    ],
)
def test_too_few_classes(content: str, facts: str, tmp_path: Path) -> None:
    path = write_text(tmp_path / "train.csv", content)
    with pytest.raises(DataError) as error:
        infer_label_names(TaskConfig("mine", kind="classification", data_dir=str(tmp_path)))
    assert f"{path}: {facts}" in str(error.value)


def test_columns_of_labels_instead_of_rows(tmp_path: Path) -> None:
    write_text(tmp_path / "train.json", json.dumps(ROWS))
    for task in (TASK, TaskConfig("mine", kind="classification", data_dir=str(tmp_path))):
        with pytest.raises(DataError, match=r"train\.json: .*the file is one JSON object"):
            custom_task(infer_label_names(task)).load(str(tmp_path), ["train"])


def test_a_score_is_a_number_as_other_programs_read_it(tmp_path: Path) -> None:
    write_text(tmp_path / "train.csv", "text,label\na,1\nb,2021_01\n")
    found = message(TaskConfig("mine", kind="regression"), tmp_path)
    assert "row 1 (counting from 0) has the label '2021_01' in column 'label'; expected a number" in found


@pytest.mark.parametrize(
    ("scores", "fact"),
    [
        ([0.5, True], "values of several types: row 1 (counting from 0) has True; expected a number"),
        ([0.5, 10**400], "row 1 (counting from 0) has the integer 1000"),
        ([1, 2**70], f"row 1 (counting from 0) has the integer {2**70}"),
    ],
)
def test_a_score_that_no_column_of_numbers_holds_is_named(scores: list[Any], fact: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a", "label": score} for score in scores])
    assert fact in message(TaskConfig("mine", kind="regression"), tmp_path)


def test_missing_labels_are_no_class(tmp_path: Path) -> None:
    task = TaskConfig("mine", kind="classification", label_names=("None", "nan"))
    for label in (None, float("nan")):
        write_rows(tmp_path / "train.parquet", [{"text": "a", "label": label}, {"text": "b", "label": None}])
        found = message(task, tmp_path)
        assert "row 0 (counting from 0)" in found
        assert "did you mean" not in found


def test_truth_values_in_either_spelling(tmp_path: Path) -> None:
    for names in (("False", "True"), ("false", "true")):
        task = TaskConfig("mine", kind="classification", label_names=names)
        write_text(tmp_path / "train.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": false}\n')
        assert columns(task, tmp_path)["label"] == [1, 0]


def test_white_space_around_a_label_makes_no_class(tmp_path: Path) -> None:
    write_text(tmp_path / "train.csv", "text,label\na,neg \nb, pos\nc,pos\n")
    assert columns(TASK, tmp_path)["label"] == [0, 1, 1]
    inferred = TaskConfig("mine", kind="classification", data_dir=str(tmp_path))
    assert infer_label_names(inferred).label_names == ("neg", "pos")


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_ids_that_pandas_has_written_as_fractions(suffix: str, tmp_path: Path) -> None:
    in_table = suffix in (".csv", ".tsv")  # whose values are texts
    rows = [
        {"text": text, "label": str(id_) if in_table else id_} for text, id_ in (("a", 1.0), ("b", 0.0), ("c", 1.0))
    ]
    write_rows(tmp_path / f"train{suffix}", rows)
    inferred = TaskConfig("mine", kind="classification", data_dir=str(tmp_path))
    assert infer_label_names(inferred).label_names == ("0", "1")
    for task in (TASK, inferred):
        assert columns(task, tmp_path)["label"] == [1, 0, 1]


def test_a_fraction_is_no_class_id(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.0}])
    assert "row 0 (counting from 0) has the label 0.5" in message(TASK, tmp_path)
    with pytest.raises(DataError, match=r"holds 0\.5; expected classes.*task\.kind=regression"):
        infer_label_names(TaskConfig("mine", kind="classification", data_dir=str(tmp_path)))


def test_version_numbers_stay_the_names_of_classes(tmp_path: Path) -> None:
    write_text(tmp_path / "train.csv", "text,label\na,1.0\nb,1.5\n")
    task = TaskConfig("mine", kind="classification", data_dir=str(tmp_path))
    assert infer_label_names(task).label_names == ("1.0", "1.5")
    assert columns(task, tmp_path)["label"] == [0, 1]


def test_rows_of_several_adapters(tmp_path: Path) -> None:
    rows = [{"adapter": "a", "text": "x", "other": ""}, {"adapter": "b", "text": "", "other": "y"}]
    for suffix in TABLE_SUFFIXES:
        path = write_rows(tmp_path / f"rows{suffix}", rows)
        found = read_texts_of_adapters(path, {"a": ("text",), "b": ("other",)})
        assert found == [("a", {"text": "x"}), ("b", {"other": "y"})]
        with pytest.raises(DataError, match=r"row 1 \(counting from 0\): no adapter 'b' was given"):
            read_texts_of_adapters(path, {"a": ("text",)})
        with pytest.raises(DataError, match=r"row 1 \(counting from 0\), column 'text': expected a text; found"):
            read_texts_of_adapters(path, {"a": ("text",), "b": ("text", "other")})
    with pytest.raises(DataError, match=r"rows\.txt: expected a file with the columns adapter and text"):
        read_texts_of_adapters(write_text(tmp_path / "rows.txt", "x\n"), {"a": ("text",)})


REFUSED: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "unknown suffix": ("a.xlsx", "x", ("unknown suffix '.xlsx'", ".csv, .tsv, .jsonl, .json or .txt")),
    "no suffix": ("rows", "x", ("unknown suffix ''", ".csv")),
    "a workbook as CSV": ("a.csv", b"PK\x03\x04\0", ("Excel workbook",)),
    "zstd": ("a.jsonl", b"\x28\xb5\x2f\xfd\x04", ("a zstd file", "unpack it")),
    "bzip2": ("a.csv", b"BZh91AY&SY", ("a bzip2 file", "unpack it")),
    "xz": ("a.csv", b"\xfd7zXZ\0", ("an xz file", "unpack it")),
    "a pointer of git-lfs": (
        "a.csv",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        ("git-lfs", "download"),
    ),
    "Arrow as JSON": ("a.json", b"ARROW1\0\0", ("an Arrow file", "parquet")),
    "a comma after each object": ("a.jsonl", '{"text": "a"},\n', ("line 1", "a JSON object on one line", "column 14")),
    "an object on several lines": (
        "a.json",
        '{\n"text": "a"\n}',
        ("line 1", "a JSON object on one line", "the file is one"),
    ),
    "columns instead of rows": ("a.json", '{"text": {"0": "a", "1": "b"}}', ("'text'", "one JSON object", "orient=")),
    "rows under a key": ("a.json", '{"data": [{"text": "a"}]}', ("found: data", "one JSON object")),
    "an empty array": ("a.json", "[]", ("no rows",)),
    "vertical bars": ("a.csv", "text|label\na|pos\n", ("no column 'text'", "Vertical bars", "commas")),
    "parquet as CSV": ("a.csv", b"PAR1\0", ("name it .parquet",)),
    "a pointer as parquet": ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", ("pointer of git-lfs",)),
    "CSV as parquet": ("a.parquet", "text\na\n", ("cannot be read as parquet",)),
    "a table as text": ("a.txt", 'label,"text"\npos,a\n', ("line 1", "a header", ".csv")),
    "JSON lines as text": ("a.txt", '{"text": "a"}\n', ("line 1", ".jsonl")),
    "tabs as CSV": ("a.csv", "text\tlabel\na\tpos\n", ("no column 'text'", "Tabs", ".tsv")),
    "semicolons": ("a.csv", "text;label\na;pos\n", ("no column 'text'", "found: text;label", "Semicolons")),
    "a line for Excel": ("a.csv", "sep=,\r\ntext,label\r\na,pos\r\n", ("no column 'text'", "Excel", "delete it")),
    "a line for Excel and semicolons": ("a.csv", "sep=;\ntext;label\na;pos\n", ("Excel", "delete it")),
    "no header": ("a.csv", "good film,pos\n", ("no column 'text'", "found: good film, pos", "first line")),
    "another column": ("a.csv", "texd\na\n", ("no column 'text' (did you mean 'texd'?)",)),
    "a repeated column": ("a.csv", "text,text\na,b\n", ("the header names 'text' more than once",)),
    "a row that is too deep": ("a.jsonl", '{"text": ' + "[" * 200 + "]" * 200 + "}\n", ("line 1", "levels of nesting")),
    "a repeated key": ("a.jsonl", '{"text": "a", "text": "b"}\n', ("line 1", "'text' appears more than once")),
    "an unquoted comma": ("a.csv", "text,label,\ngood, very good,pos\n", ("line 2", "3 fields", "expected 2")),
    "an open quote": ("a.csv", 'text,label\na,pos\n"b,pos\nc,pos\n', ("line 3", "unexpected end")),
    "an empty line of one column": ("a.csv", "text\na\n\nb\n", ("line 3: empty",)),
    "an empty line": ("a.txt", "a\n\nb\n", ("line 2: empty",)),
    "an empty line of JSON": (
        "a.jsonl",
        '{"text": "a"}\n\n{"text": "b"}\n',
        ("line 2: empty; expected a JSON object",),
    ),
    "an empty text": ("a.csv", 'text\na\n""\n', ("row 1 (counting from 0)", "column 'text'", "found ''")),
    "a number": ("a.jsonl", '{"text": 3}\n', ("column 'text' should hold text", "found int64")),
    "a number among texts": ("a.json", '[{"text": "a"}, {"text": 3}]', ("'text'", "row 1", "has 3", "a text")),
    "a missing key": ("a.jsonl", '{"text": "a"}\n{"x": "b"}\n', ("row 1 (counting from 0)", "None")),
    "a list": ("a.json", '["a"]', ("entry 0", "expected an object", "'a'")),
    "a broken array": ("a.json", '[{"text": "a"},', ("not an array of objects",)),
    "nothing": ("a.csv", "", ("empty; expected the names",)),
    "no rows": ("a.csv", "text\n", ("no rows",)),
    "half a surrogate pair": ("a.jsonl", '{"text": "\\ud800"}\n', ("row 0", "surrogate")),
    "Latin-1": ("a.csv", "text\ngut\ns\xfc\xdf\n".encode("latin-1"), ("line 3", "not UTF-8", "0xfc")),
    "a byte too many": ("a.txt", "a" * 1_000_001, ("at most 1,000,000 bytes",)),
}


@pytest.mark.parametrize(("name", "content", "facts"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(name: str, content: str | bytes, facts: tuple[str, ...], tmp_path: Path) -> None:
    path = write_text(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read_texts(path, ("text",))
    found = str(error.value)
    assert found.startswith(str(path))
    assert [fact for fact in facts if fact not in found] == [], found


def test_a_split_of_another_suffix_is_named(tmp_path: Path) -> None:
    write_text(tmp_path / "train.xlsx", "")
    write_text(tmp_path / "dev.csv", "")
    found = message(TASK, tmp_path)
    assert "found train.xlsx" in found
    assert "found dev.csv, train.xlsx" in message(TASK, tmp_path, "validation")
    assert all(suffix in found for suffix in TABLE_SUFFIXES)


NOTHING: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((".csv", ".tsv"), ("", "COLUMNS\n")),
    **dict.fromkeys((".jsonl", ".txt"), ("", "\n")),
    ".json": ("", "[]", "{}", '{"data": []}', '{"data": [{"paragraphs": []}]}'),
    ".conll": ("", "-DOCSTART- -X- O\n\n"),
    ".parquet": ("string", "list", "null"),  # the types of its columns
}
TYPES = {"string": pyarrow.string(), "list": pyarrow.list_(pyarrow.string()), "null": pyarrow.null()}
NO_ROWS = {"tokens": (".conll", ".parquet"), "question_answering": (".json",)}


@pytest.mark.parametrize("suffix", NOTHING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_to_answer_without_rows(kind: Any, suffix: str, tmp_path: Path) -> None:
    named = kind in ("classification", "multi_label", "tokens")
    task = custom_task(TaskConfig("mine", kind=kind, label_names=("neg", "pos") if named else None))
    read = task.read_prompts if isinstance(task, TextGeneration) else task.read_inputs
    path, names = tmp_path / f"rows{suffix}", KINDS[kind].text_columns
    for content in NOTHING[suffix]:
        if suffix == ".parquet":
            pyarrow.parquet.write_table(
                pyarrow.table({name: pyarrow.array([], TYPES[content]) for name in names}), path
            )
        else:
            write_text(path, content.replace("COLUMNS", (",\t"[suffix == ".tsv"]).join(names)))
        with pytest.raises(DataError) as error:
            read(path)
        assert str(error.value).startswith(str(path))
        if suffix in NO_ROWS.get(kind, ()) and content and content in NOTHING[suffix][-2:]:
            assert "no rows; expected at least one" in str(error.value)
