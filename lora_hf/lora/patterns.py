"""Where an adapter deviates from its common numbers: its layers, and the rank and alpha of single places.

The words are PEFT's: `rank_pattern`, `alpha_pattern`, and `layers` for its `layers_to_transform`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lora_hf.core.config.schema import PRESETS, LoraConfig
from lora_hf.core.errors import ConfigError
from lora_hf.lora.layers import features


def path_expression(pattern: str, prefix: str) -> re.Pattern[str]:
    """Matches whole module paths: `*` stands for one segment, and the `prefix` of the base may be left out."""
    return re.compile(f"(?:{re.escape(prefix)})?" + re.escape(pattern).replace(r"\*", r"[^.]+"))


def numbers_of(
    sites: Iterable[Any], layers: Mapping[str, nn.Module], lora: LoraConfig, prefix: str
) -> dict[str, tuple[list[tuple[int, int]], int, float]]:
    """For the path of each site its slices, rank and alpha.

    Args:
        sites: with `role`, `path` and `slice`.
        layers: the plain projections by their paths.

    Raises:
        ConfigError: a pattern that fits no site, a rank above the smaller side of a projection, or two numbers for
            roles that are one projection.
    """
    sites = list(sites)
    for key in ("rank_pattern", "alpha_pattern"):
        _check(key, getattr(lora, key), sites, prefix)
    numbers: dict[str, tuple[list[tuple[int, int]], int, float]] = {}
    for site in sites:
        in_features, out_features = features(layers[site.path])
        start, stop = site.slice or (0, out_features)
        r = _value_at(lora.rank_pattern, site, prefix, lora.r)
        alpha = _value_at(lora.alpha_pattern, site, prefix, lora.lora_alpha)
        if r > min(in_features, stop - start):
            raise ConfigError(
                f"lora.r: {site.path} maps {in_features} to {stop - start}; expected a rank of at most "
                f"{min(in_features, stop - start)}, found {r}"
            )
        slices, common_r, common_alpha = numbers.setdefault(site.path, ([], r, alpha))
        if (r, alpha) != (common_r, common_alpha):
            raise ConfigError(
                f"lora.rank_pattern, lora.alpha_pattern: {site.path} is one projection for several roles, which share "
                f"r and lora_alpha; found {common_r}, {common_alpha:g} and, for {site.role}, {r}, {alpha:g}"
            )
        slices.append((start, stop))
    return numbers


def layer_of(path: str) -> int | None:
    """The number of the layer that a module path lies in: 3 for `encoder.layer.3.output.dense`."""
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return int(number[1]) if number else None


def in_layers(path: str, chosen: list[int] | int | None) -> bool:
    """PEFT's layers_to_transform: a list of layers, a single one, or, where it is empty, all."""
    if chosen is None or chosen == []:
        return True
    return layer_of(path) in (chosen if isinstance(chosen, list) else [chosen])


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


def _value_at(patterns: Mapping[str, Any], site: Any, prefix: str, common: Any) -> Any:
    """The number of the first pattern that is the place's role, a preset of it, or its path; else the common one."""
    return next((value for key, value in patterns.items() if _fits(key, site, prefix)), common)


def _check(name: str, patterns: Mapping[str, Any], sites: list[Any], prefix: str) -> None:
    for key in patterns:
        if not any(_fits(key, site, prefix) for site in sites):
            roles = ", ".join(dict.fromkeys(site.role for site in sites)) or "nothing"
            raise ConfigError(f"lora.{name}: {key!r} fits no adapted place; lora.targets adapts {roles}")


def _fits(key: str, site: Any, prefix: str) -> bool:
    if "." in key:
        return path_expression(key, prefix).fullmatch(site.path) is not None
    return site.role in PRESETS.get(key, (key,))
