from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.errors import DataError
from lora_hf.data.input_files import read_rows

PAIR = ("sentence1", "sentence2")


def test_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.txt", ("sentence",)) == {"sentence": ["one", "two"]}
    (tmp_path / "a.jsonl").write_text('{"sentence1": "a", "sentence2": "ü", "idx": 3}\n', encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl", PAIR) == {"sentence1": ["a"], "sentence2": ["ü"]}


def test_rows_end_at_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\u2028two\x85three\r\nfour\n".encode())
    assert read_rows(tmp_path / "a.txt", ("sentence",)) == {"sentence": ["one\u2028two\x85three", "four"]}
    (tmp_path / "a.jsonl").write_bytes('{"sentence": "one\u2028two"}\n'.encode())
    assert read_rows(tmp_path / "a.jsonl", ("sentence",)) == {"sentence": ["one\u2028two"]}


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.txt", b"", ("sentence",), "a.txt: empty"),
        ("a.txt", b"good\n\xff\n", ("sentence",), "a.txt, line 2: not UTF-8: found the byte 0xff"),
        ("a.txt", b"good\n \n", ("sentence",), "a.txt, line 2: empty; expected a text"),
        ("a.txt", b"good\n", PAIR, "this task reads sentence1 and sentence2; expected a .jsonl file with these keys"),
        ("a.jsonl", b"{\n", ("sentence",), "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b"[1]\n", ("sentence",), "a.jsonl, line 1: expected an object"),
        (
            "a.jsonl",
            b'{"sentense": "x"}\n',
            ("sentence",),
            "line 1: expected a text under 'sentence', found None (did you mean 'sentense'?)",
        ),
        ("a.jsonl", b'{"sentence": 3}\n', ("sentence",), "expected a text under 'sentence', found 3"),
    ],
)
def test_an_unreadable_file(name: str, content: bytes, columns: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / name, columns)
    assert message in str(error.value)
