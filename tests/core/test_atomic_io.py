from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.atomic_io import atomic_folder, atomic_path, check_output_folder
from lora_hf.core.errors import ConfigError

MARK = "mark.json"


def make(folder: Path, text: str, overwrite: bool = False, fails: bool = False) -> None:
    with atomic_folder(folder, MARK, overwrite) as aside:
        (aside / MARK).write_text(text)
        if fails:
            raise ZeroDivisionError


def test_a_folder_is_written_whole_and_replaced_whole(tmp_path: Path) -> None:
    made = tmp_path / "deep" / "made"
    make(made, "1")
    (made / "more").write_text("of the first")
    make(made, "2", overwrite=True)
    assert [(file.name, file.read_text()) for file in made.iterdir()] == [(MARK, "2")]
    assert [place.name for place in made.parent.iterdir()] == ["made"], "nothing is left beside it"
    assert made.stat().st_mode & 0o777 == made.parent.stat().st_mode & 0o777


def test_an_empty_folder_is_not_in_the_way(tmp_path: Path) -> None:
    make(tmp_path, "1")
    assert (tmp_path / MARK).read_text() == "1"


def test_an_error_leaves_nothing_new_and_all_that_was(tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "made", "half", overwrite, fails=True)
        assert (tmp_path / "made").exists() == overwrite
        make(tmp_path / "made", "whole", overwrite=True)
        assert (tmp_path / "made" / MARK).read_text() == "whole"
    assert [place.name for place in tmp_path.iterdir()] == ["made"]


def test_what_is_in_the_way_is_told_and_left_alone(tmp_path: Path) -> None:
    file, foreign, ours = tmp_path / "file", tmp_path / "foreign", tmp_path / "ours"
    file.write_text("x")
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    make(ours, "1")
    for place, overwrite, message in (
        (file, True, "expected a folder, found a file"),
        (foreign, False, "exists and is not empty; choose another folder$"),
        (foreign, True, "holds no mark.json, so overwrite does not replace it"),
        (ours, False, "or pass overwrite=True to replace it"),
        (file / "below", False, "cannot be written: File exists"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(place, "2", overwrite)
    assert (foreign / "thesis.txt").read_text() == file.read_text() == "x"
    assert (ours / MARK).read_text() == "1"
    check_output_folder(ours, MARK, overwrite=True)


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
