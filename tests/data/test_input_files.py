from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.errors import DataError
from lora_hf.data.input_files import read_rows

PAIR = ("sentence1", "sentence2")


def test_a_text_a_line_and_a_json_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.txt", ("sentence",)) == {"sentence": ["one", "two"]}
    (tmp_path / "a.jsonl").write_text('{"sentence1": "a", "sentence2": "ü", "idx": 3}\n', encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl", PAIR) == {"sentence1": ["a"], "sentence2": ["ü"]}


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.txt", b"", ("sentence",), "a.txt: empty; expected a row a line"),
        ("a.txt", b"good\n\xff\n", ("sentence",), "a.txt: not UTF-8 at byte 5; save it as UTF-8"),
        ("a.txt", b"good\n \n", ("sentence",), "a.txt, line 2: empty; expected a text"),
        ("a.txt", b"good\n", PAIR, "this task reads sentence1 and sentence2; expected a .jsonl file with these keys"),
        ("a.jsonl", b"{\n", ("sentence",), "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b"[1]\n", ("sentence",), "a.jsonl, line 1: expected a text under 'sentence', found None"),
        (
            "a.jsonl",
            b'{"sentense": "x"}\n',
            ("sentence",),
            "line 1: expected a text under 'sentence', found None (did you mean 'sentense'?)",
        ),
        ("a.jsonl", b'{"sentence": 3}\n', ("sentence",), "expected a text under 'sentence', found 3"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(
    name: str, content: bytes, columns: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / name, columns)
    assert message in str(error.value)
