"""Where an adapter deviates from its common numbers: its layers, and the rank and alpha of single places.

The words are PEFT's: `rank_pattern`, `alpha_pattern`, and `layers` for its `layers_to_transform`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_hf.config import PRESETS
from lora_hf.errors import ConfigError


def path_expression(pattern: str, prefix: str) -> re.Pattern[str]:
    """Matches whole module paths: `*` stands for one segment, and the `prefix` of the base may be left out."""
    return re.compile(f"(?:{re.escape(prefix)})?" + re.escape(pattern).replace(r"\*", r"[^.]+"))


def value_at(patterns: Mapping[str, Any], role: str, path: str, prefix: str, common: Any) -> Any:
    """The number of the first pattern that is the place's role, a preset of it, or its path; else the common one."""
    return next((value for key, value in patterns.items() if _fits(key, role, path, prefix)), common)


def check_patterns(name: str, patterns: Mapping[str, Any], places: Iterable[tuple[str, str]], prefix: str) -> None:
    """Raises ConfigError for a pattern that fits none of the `(role, path)` that are adapted."""
    places = list(places)
    for key in patterns:
        if not any(_fits(key, role, path, prefix) for role, path in places):
            roles = ", ".join(dict.fromkeys(role for role, _ in places)) or "nothing"
            raise ConfigError(f"lora.{name}: {key!r} fits no adapted place; lora.targets adapts {roles}")


def layer_of(path: str) -> int | None:
    """The number of the layer that a module path lies in: 3 for `encoder.layer.3.output.dense`."""
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return int(number[1]) if number else None


def chosen_layers(layers: Iterable[int], paths: Iterable[str]) -> set[int]:
    """The numbers meant by `lora.layers`, where -1 is the last layer.

    Args:
        paths: of all modules of the model, which say how many layers it has.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    count = 1 + max((number for path in paths if (number := layer_of(path)) is not None), default=-1)
    beyond = [str(layer) for layer in layers if not -count <= layer < count]
    if beyond:
        raise ConfigError(f"lora.layers: this model has {count} layers, 0 to {count - 1}; found {', '.join(beyond)}")
    return {layer % count for layer in layers}


def _fits(key: str, role: str, path: str, prefix: str) -> bool:
    if "." in key:
        return path_expression(key, prefix).fullmatch(path) is not None
    return role in PRESETS.get(key, (key,))
