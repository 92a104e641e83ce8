from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.atomic_io import atomic_folder, atomic_path, check_output_folder, write_json_atomic
from lora_hf.core.errors import ConfigError

MARKER = "marker.json"


def make(folder: Path, text: str, overwrite: bool = False, fails: bool = False) -> None:
    with atomic_folder(folder, MARKER, overwrite) as tmp:
        (tmp / MARKER).write_text(text)
        if fails:
            raise ZeroDivisionError


def test_a_folder_is_written_and_replaced(tmp_path: Path) -> None:
    made = tmp_path / "deep" / "made"
    make(made, "1")
    (made / "more").write_text("of the first")
    make(made, "2", overwrite=True)
    assert [(file.name, file.read_text()) for file in made.iterdir()] == [(MARKER, "2")]
    assert [path.name for path in made.parent.iterdir()] == ["made"], "nothing is left beside it"
    assert made.stat().st_mode & 0o777 == made.parent.stat().st_mode & 0o777


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    make(tmp_path, "1")
    assert (tmp_path / MARKER).read_text() == "1"


def test_an_error_keeps_the_previous_folder(tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "made", "half", overwrite, fails=True)
        assert (tmp_path / "made").exists() == overwrite
        make(tmp_path / "made", "whole", overwrite=True)
        assert (tmp_path / "made" / MARKER).read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_existing_files_and_folders_are_refused_and_unchanged(tmp_path: Path) -> None:
    file, other, earlier = tmp_path / "file", tmp_path / "other", tmp_path / "earlier"
    file.write_text("x")
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    make(earlier, "1")
    for folder, overwrite, message in (
        (file, True, "expected a folder, found a file"),
        (other, False, "exists and is not empty; choose another folder$"),
        (other, True, "holds no marker.json, so overwrite does not replace it"),
        (earlier, False, "or pass overwrite=True to replace it"),
        (file / "below", False, "cannot be written: File exists"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(folder, "2", overwrite)
    assert (other / "thesis.txt").read_text() == file.read_text() == "x"
    assert (earlier / MARKER).read_text() == "1"
    check_output_folder(earlier, MARKER, overwrite=True)


def write(file: Path, text: str, fails: bool = False) -> None:
    with atomic_path(file) as tmp:
        assert tmp.parent == file.parent
        tmp.write_text(text)
        if fails:
            raise ZeroDivisionError


def test_a_path_is_replaced_at_a_clean_end_only(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write(file, "1")
    with pytest.raises(ZeroDivisionError):
        write(file, "half", fails=True)
    assert file.read_text() == "1"
    write(file, "2")
    assert file.read_text() == "2"
    assert list(tmp_path.iterdir()) == [file], "nothing is left beside it"


def test_json_is_written_in_utf8_with_a_final_newline(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "record.json", {"text": "câu"})
    assert (tmp_path / "record.json").read_bytes() == '{\n "text": "câu"\n}\n'.encode()
