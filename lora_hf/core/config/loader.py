"""Reads a run config from YAML and applies overrides such as `lora.r=16`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_hf.core.config.fields import kind_of
from lora_hf.core.config.hints import find_keys
from lora_hf.core.config.schema import RunConfig, known_keys
from lora_hf.core.errors import ConfigError, did_you_mean

FORM = "expected an override of the form section.key=value, such as"
RECIPE_FOLDERS = (Path("configs"), Path(__file__).parents[3] / "configs", Path(__file__).parents[2] / "configs")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML recipe and applies overrides such as `lora.r=16`.

    Raises:
        ConfigError: a missing or malformed file, or any key that is unknown, mistyped or out of range.
    """
    return RunConfig.from_dict(read_sections(path, overrides), source=str(path))


def read_sections(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML recipe says with the overrides applied, its keys and values not yet checked.

    Raises:
        ConfigError: a missing or malformed file or override.
    """
    file = _find(Path(path))
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(sections, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'task:', found {kind_of(sections)}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: {FORM} lora.r=16")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
        set_value(sections, key, value, override)
    return sections


def set_value(sections: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Puts the value where `section.key` points to, in place.

    Raises:
        ConfigError: `key` has no section, or leads through something that holds no keys; opens with what was `said`.
    """
    steps = key.split(".")
    if len(steps) < 2 or not all(steps):
        meant = [f"{full}{said.removeprefix(key)}" for full in find_keys(key, known_keys())]
        raise ConfigError(f"{said!r}: {FORM} {' or '.join(meant) or 'lora.r=16'}")
    level = sections
    for step in steps[:-1]:
        if not isinstance(level.get(step), dict):
            if level.get(step) is not None:
                raise ConfigError(f"{said!r}: {step} holds {kind_of(level[step])}, not further keys")
            level[step] = {}
        level = level[step]
    level[steps[-1]] = value


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    bare = path.name == str(path)
    places = [folder / path for folder in RECIPE_FOLDERS] if bare else []
    for place in places:
        if place.is_file():
            return place
    known = sorted({file.name for folder in RECIPE_FOLDERS for file in folder.glob("*.yaml")})
    where = "the current folder and configs/" if bare else "that place"
    hint = did_you_mean(path.name, known) or (f"; recipes: {', '.join(known)}" if bare else "")
    raise ConfigError(f"{path}: no such config file in {where}{hint}")
