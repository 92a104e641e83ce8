"""Reads run configs from YAML files and applies overrides such as `lora.r=16`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.config.fields import describe_value
from lora_hf.core.config.hints import find_keys
from lora_hf.core.config.schema import RunConfig, known_keys
from lora_hf.core.errors import ConfigError, did_you_mean
from lora_hf.core.parsing import parse_yaml, read_yaml

OVERRIDE_FORM = "expected an override of the form section.key=value, such as"
PATHS = ("model.name", "model.tokenizer", "task.data_dir", "train.start_from", "output.dir")
RECIPE_FOLDERS = (Path("configs"), Path(__file__).parents[3] / "configs", Path(__file__).parents[2] / "configs")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML recipe and applies overrides such as `lora.r=16`.

    Raises:
        ConfigError: a missing or malformed file, or any key that is unknown, mistyped or out of range.
    """
    return RunConfig.from_dict(read_sections(path, overrides), source=str(path))


def read_sections(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the sections of a YAML recipe with the overrides applied; keys and values are not checked yet.

    Raises:
        ConfigError: a missing or malformed file or override.
    """
    file = _find_recipe(Path(path))
    try:
        sections = read_yaml(file)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(sections, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'task:', found {describe_value(sections)}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: {OVERRIDE_FORM} lora.r=16")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
        set_value(sections, key, value, override)
    _expand_home(sections)
    return sections


def _expand_home(sections: dict[str, Any]) -> None:
    """Replaces `~` in paths, as a shell would; a variable in one would become the name of a folder."""
    for path in PATHS:
        name, key = path.split(".")
        section = sections.get(name)
        if not isinstance(section, dict) or not isinstance(value := section.get(key), str):
            continue
        if re.search(r"\$[\w{]", value):
            raise ConfigError(
                f"{path}: expected a path, found the variable in {value!r}; write it out, or set {path} on the command "
                "line, where the shell replaces variables"
            )
        if value.startswith("~"):
            section[key] = str(Path(value).expanduser())


def set_value(sections: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Sets the value of `section.key` in place.

    Args:
        override: what the user wrote, to begin error messages with.

    Raises:
        ConfigError: `key` has no section, or one of its parents is a value.
    """
    *parents, last = key.split(".")
    if not parents or not all([*parents, last]):
        meant = [f"{name}{override.removeprefix(key)}" for name in find_keys(key, known_keys())]
        raise ConfigError(f"{override!r}: {OVERRIDE_FORM} {' or '.join(meant) or 'lora.r=16'}")
    level = sections
    for parent in parents:
        if level.get(parent) is None:
            level[parent] = {}
        if not isinstance(level[parent], dict):
            found = describe_value(level[parent])
            raise ConfigError(f"{override!r}: {parent} is {found} and has no keys")
        level = level[parent]
    level[last] = value


def flatten(sections: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by `section.key`."""
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _find_recipe(path: Path) -> Path:
    bare = path.name == str(path)
    for file in [path, *(folder / path for folder in RECIPE_FOLDERS if bare)]:
        if file.is_file():
            return file
    known = sorted({file.name for folder in RECIPE_FOLDERS for file in folder.glob("*.yaml")})
    searched = "the current folder and configs/" if bare else str(path.parent)
    hint = did_you_mean(path.name, known) or (f"; recipes: {', '.join(known)}" if bare else "")
    raise ConfigError(f"{path}: no such config file in {searched}{hint}")
