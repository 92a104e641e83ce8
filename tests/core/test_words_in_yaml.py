"""What YAML 1.1 makes of words: numbers are names where names are expected, and truth values are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig, TaskConfig
from lora_hf.core.errors import ConfigError


def load(tmp_path: Path, line: str) -> TaskConfig:
    (tmp_path / "a.yaml").write_text(f"task: {{{line}}}\n", encoding="utf-8")
    return load_config(tmp_path / "a.yaml").task


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("label_names: [1, 2, 3]", "label_names", ("1", "2", "3")),
        ("label_names: [1.5, a]", "label_names", ("1.5", "a")),
        ("label_names: ['no', \"yes\"]", "label_names", ("no", "yes")),
        ("text_columns: 0", "text_columns", ("0",)),
        ("label_column: 1", "label_column", "1"),
    ],
)
def test_numbers_are_names(line: str, key: str, value: object, tmp_path: Path) -> None:
    task = load(tmp_path, line)
    assert getattr(task, key) == value
    assert RunConfig.from_dict(RunConfig(task=task).to_dict()).task == task


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("label_names: [no, yes]", "found false"),
        ("label_names: [a, on]", "found true"),
        ("text_columns: [yes]", "found true"),
        ("label_column: off", "found false"),
        ("name: no", "found false"),
        ("label_names: [2024-01-01, b]", "datetime.date"),
    ],
)
def test_what_needs_quotes(line: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, line)
    assert f"task.{line.partition(':')[0]}: expected " in str(error.value)
    assert found in str(error.value)
    assert "quotes" in str(error.value)


def test_the_wrong_item_of_a_list_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label_names: expected a word or a list of words, found a list"):
        load(tmp_path, "label_names: [a, [b]]")
