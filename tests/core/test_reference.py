"""The schema of configs and the reference page are made from the dataclasses, so they agree with the loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lora_hf.cli.main import main
from lora_hf.core.config.reference import config_keys, json_schema, type_in_words
from lora_hf.core.config.schema import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


def test_the_stored_schema_is_current(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((CONFIGS / "schema.json").read_text()), "python scripts/schema.py --output " + str(
        CONFIGS / "schema.json"
    )
    assert main(["schema", "--output", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == printed


def test_every_recipe_names_the_schema_and_satisfies_it() -> None:
    checker = jsonschema.Draft202012Validator(json_schema())
    checker.check_schema(json_schema())
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8")
        assert text.startswith("# yaml-language-server: $schema=schema.json\n"), recipe.name
        assert list(checker.iter_errors(_as_editors_read(text))) == [], recipe.name
    assert list(checker.iter_errors(RunConfig().to_dict())) == []


def _as_editors_read(text: str) -> Any:
    """YAML 1.2 reads 5e-4 as a number, PyYAML as text; a loader that knows no types leaves both to us."""
    return _numbers(yaml.safe_load(text))


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@pytest.mark.parametrize(
    "sections",
    [
        {"lorra": {}},
        {"lora": {"rank": 8}},
        {"lora": {"r": 0}},
        {"lora": {"r": 2.5}},
        {"lora": {"lora_dropout": 1.5}},
        {"lora": {"targets": [1]}},
        {"train": {"lr": 0}},
        {"train": {"schedule": "cosin"}},
        {"model": {"name": None}},
        {"output": {"overwrite": "yes"}},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(sections: dict[str, Any]) -> None:
    assert RunConfig.check(sections)[1]
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(sections)


def test_every_key_says_what_it_means() -> None:
    keys = list(config_keys())
    assert len(keys) > 50
    for key in keys:
        assert key.doc, key
        assert not key.doc.endswith("."), key
    words = {f"{key.section}.{key.name}": type_in_words(key) for key in keys}
    assert words["lora.r"] == "integer >= 1"
    assert words["train.lr"] == "number > 0"
    assert words["model.dropout"] == "number >= 0 and <= 0.99"
    assert words["lora.targets"] == "list of words"
