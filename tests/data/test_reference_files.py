from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.errors import DataError
from lora_hf.data.reference_files import read_predictions, read_references


@pytest.fixture
def references(tmp_path: Path) -> Path:
    (tmp_path / "refs.txt").write_text("one\neins\n\ntwo\n", encoding="utf-8")
    return tmp_path / "refs.txt"


def test_empty_lines_separate_groups(references: Path, tmp_path: Path) -> None:
    read = read_references([references])
    assert (read.groups, read.tokenized) == ([["one", "eins"], ["two"]], False)
    (tmp_path / "out.txt").write_text("uno\ndos\n")
    assert read_predictions(tmp_path / "out.txt", read) == ["uno", "dos"]


def test_each_lex_file_of_a_folder_holds_one_reference_per_input(tmp_path: Path) -> None:
    (tmp_path / "gold-reference0.lex").write_text("a .\nb .\n")
    (tmp_path / "gold-reference1.lex").write_text("A .\n\n")
    read = read_references([tmp_path])
    assert (read.groups, read.tokenized) == ([["a .", "A ."], ["b ."]], True)


def test_the_real_files(data_dir: Path) -> None:
    groups = read_references([data_dir / "e2e_eval" / "dev_refs.txt"]).groups
    assert (len(groups), sum(map(len, groups))) == (547, 4672)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"uno\n", "expected a prediction for each of 2 groups of references, found 1 lines"),
        (b"uno\n\ndos\n", "out.txt, line 2: empty; expected a prediction"),
        (b"uno\nd\xffs\n", "out.txt, line 2: not UTF-8"),
        (b"", "out.txt: empty"),
        (None, "out.txt: cannot be read"),
    ],
)
def test_predictions_that_cannot_be_scored(
    content: bytes | None, message: str, references: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "out.txt").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_predictions(tmp_path / "out.txt", read_references([references]))
    assert message in str(error.value)


def test_lex_files_of_different_lengths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gold-reference0.lex").write_text("a\nb\nc\n")
    (tmp_path / "gold-reference1.lex").write_text("a\n")
    with pytest.raises(DataError, match="expected 3 lines as in"):
        read_references([tmp_path])
