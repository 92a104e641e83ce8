"""YAML and JSON of others: small files that stand for huge or endless values are refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.adapters.format import read_adapter_config
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.config.loader import load_config
from lora_hf.core.errors import AdapterError, ConfigError, DataError
from lora_hf.core.parsing import MAX_DEPTH, MAX_YAML_BYTES, parse_json, parse_yaml, read_yaml
from lora_hf.core.records import RunRecord
from tests.support.adapters_on_disk import run_folder

LEVELS = "abcdefghij"


def bomb(kind: str) -> str:
    """Each level holds the one before ten times over: 10^9 values in a few hundred bytes."""
    lines = [f"a: &a {'[x, x]' if kind == 'list' else '{x: x}'}"]
    for index, level in enumerate(LEVELS[1:]):
        before = LEVELS[index]
        parts = ", ".join([f"*{before}"] * 10)
        keyed = ", ".join(f"{key}: *{before}" for key in LEVELS)
        value = {"list": f"[{parts}]", "map": f"{{{keyed}}}", "merge": f"{{<<: [{parts}]}}"}[kind]
        lines.append(f"{level}: &{level} {value}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((bomb(kind), "aliases") for kind in ("list", "map", "merge")),
        ("a: &a [*a]", "contains it"),
        ("a: &a {b: *a}", "contains it"),
        ("[\n" * 5000, "levels of nesting"),
        ("a: " + "1:" * 50_000 + "1", "digits"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "levels of nesting"),
        ("x0: &x0 [1]\n" + "\n".join(f"x{n + 1}: &x{n + 1} [*x{n}]" for n in range(MAX_DEPTH)), "levels of nesting"),
        ("a" * (MAX_YAML_BYTES + 1), "bytes"),
        ("a: [1", "expected"),
        ("a: 2024-99-99", "month"),
        ("? [1, {a: b}]\n: 1", "unhashable"),
        ("train: {lr: 1}\nlora: {r: 2}\ntrain: {batch_size: 4}", "line 3: the key 'train' appears more than once"),
        ("{lr: 1, lr: 2}", "line 1: the key 'lr' appears more than once"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not a readable YAML file"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config("rule_sentiment.yaml", [f"lora.r={text}"])


def test_yaml_that_people_write(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {lr: 1}\nrun: {<<: *base, x: [*base, ü]}\n", encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == {"base": {"lr": 1}, "run": {"lr": 1, "x": [{"lr": 1}, "ü"]}}
    assert parse_yaml("{<<: {a: 1}, <<: {b: 2}, 1: 2}") == {"a": 1, "b": 2, 1: 2}
    assert parse_yaml("") is None
    assert parse_yaml("16") == 16


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200 + "1" + "}" * 200, "[1", "", '{"r": 4, "r": 8}'])
def test_json_that_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(DataError, match="not a readable record"):
        RunRecord.load(tmp_path / "record.json")


def test_an_adapter_with_such_files_is_refused(tmp_path: Path) -> None:
    adapter = run_folder(tmp_path)
    config = adapter.parent / "config.yaml"
    config.write_text(bomb("list"))
    with pytest.raises(ConfigError, match="aliases"):
        find_saved_model(adapter)
    (adapter / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(AdapterError, match="damaged adapter: expected at most"):
        read_adapter_config(adapter)
