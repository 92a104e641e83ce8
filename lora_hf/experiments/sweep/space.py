"""The search space of a sweep: parsed from words such as `lora.r=4..64:log2` and checked against the config.

Imports neither torch nor optuna, so that errors appear at once.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.loader import read_sections, set_value
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, did_you_mean
from lora_hf.core.formatting import count
from lora_hf.core.parsing import parse_yaml

if TYPE_CHECKING:
    from optuna.trial import Trial

SCALES = ("log", "log2")
RATE, RANK = "train.lr", "lora.r"
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(?::(\w*))?")
MULTIPLE = re.compile(rf"({NUMBER})\*([a-z_]+\.[\w.]+)")
# Keys that change what is scored, or have no effect on the score.
FIXED = {
    "task.name": "scores of different tasks cannot be compared",
    "task.data_dir": "scores on different rows cannot be compared",
    "task.kind": "scores of different kinds cannot be compared",
    "output.plots": "pictures change no score",
    "task.label_column": "scores on different labels cannot be compared",
    "task.label_names": "scores on different labels cannot be compared",
    "task.label_columns": "scores on different labels cannot be compared",
    "task.label_separator": "scores on different labels cannot be compared",
    "task.thresholds": "they are chosen for each run",
    "task.validation": "scores on different rows cannot be compared",
    "task.split_seed": "scores on different rows cannot be compared",
    "task.train_on": "perplexities of different tokens cannot be compared",
    "task.chat_template": "perplexities of different tokens cannot be compared",
    "task.drop_unlearnable": "scores on different rows cannot be compared",
    "task.metric": "scores by different metrics cannot be compared",
    "generate": "decoding has no effect on the score on the development rows",
}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high` inclusive; on the scale `log2`, the powers of two among them."""

    key: str
    low: Any  # an int if `is_int`
    high: Any
    scale: str  # linear, log or log2
    is_int: bool

    def __str__(self) -> str:
        return f"{self.key}={self.low}..{self.high}" + ("" if self.scale == "linear" else f":{self.scale}")

    @property
    def parameter(self) -> str:
        """Name of the number that the sampler draws: for powers of two the exponent, which has equal steps."""
        return f"log2({self.key})" if self.scale == "log2" else self.key

    @property
    def limits(self) -> tuple[Any, Any]:
        """The lowest and the highest number that the sampler draws."""
        if self.scale == "log2":
            return math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
        return self.low, self.high

    def draw(self, trial: Trial) -> None:
        suggest = trial.suggest_int if self.is_int or self.scale == "log2" else trial.suggest_float
        suggest(self.parameter, *self.limits, log=self.scale == "log")

    def value(self, drawn: Mapping[str, Any]) -> Any:
        """The value of the key for the number drawn."""
        number = drawn[self.parameter]
        if self.scale == "log2":
            number = 2.0**number
        return int(number) if self.is_int else number

    def grid(self) -> list[Any]:
        """Every number that the sampler can draw.

        Raises:
            ConfigError: there is no end of them.
        """
        low, high = self.limits
        if not (self.is_int or self.scale == "log2"):
            raise ConfigError(f"{self}: a grid needs single values, such as {self.key}={self.low:g},{self.high:g}")
        return list(range(low, high + 1))

    def bounds(self) -> list[Any]:
        """The values to check against the config: the lowest and the highest."""
        return [self.value({self.parameter: limit}) for limit in self.limits]


@dataclass(frozen=True)
class Choice:
    """One of several values, each written as YAML."""

    key: str
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key}={'|'.join(self.texts)}"

    @property
    def parameter(self) -> str:
        """Name of the text that the sampler draws."""
        return self.key

    def grid(self) -> list[Any]:
        """Every text that the sampler can draw."""
        return list(self.texts)

    def draw(self, trial: Trial) -> None:
        trial.suggest_categorical(self.key, self.texts)

    def value(self, drawn: Mapping[str, Any]) -> Any:
        """The value of the key for the text drawn."""
        return _parse_value(drawn[self.key])

    def bounds(self) -> list[Any]:
        """The values to check against the config: all of them."""
        return list(map(_parse_value, self.texts))


@dataclass(frozen=True)
class Multiple:
    """`factor` times the value of the key `base`."""

    key: str
    factor: float
    base: str

    def __str__(self) -> str:
        return f"{self.key}={self.factor}*{self.base}"

    def value(self, values: Mapping[str, Any]) -> float:
        """The value of the key; an int where possible."""
        product = self.factor * values[self.base]
        return int(product) if float(product).is_integer() else product


@dataclass(frozen=True)
class Space:
    """Everything that a sweep varies."""

    dimensions: tuple[Range | Choice, ...]
    multiples: tuple[Multiple, ...] = ()

    def words(self) -> list[str]:
        """The space as it is typed, in alphabetical order."""
        return sorted(str(part) for part in (*self.dimensions, *self.multiples))

    def draw(self, trial: Trial) -> None:
        for dimension in self.dimensions:
            dimension.draw(trial)

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the values, as parameters of a trial; the last key varies fastest.

        Raises:
            ConfigError: a range has no single values.
        """
        names = [dimension.parameter for dimension in self.dimensions]
        points = itertools.product(*(dimension.grid() for dimension in self.dimensions))
        return [dict(zip(names, point, strict=True)) for point in points]

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each key, from the parameters of a trial."""
        values = {dimension.key: dimension.value(drawn) for dimension in self.dimensions}
        return values | {multiple.key: multiple.value(values) for multiple in self.multiples}


def with_values(config: RunConfig, values: Mapping[str, Any], source: str) -> RunConfig:
    """A copy of the config with these values.

    Raises:
        ConfigError: the combination is invalid.
    """
    sections = config.to_dict()
    for key, value in values.items():
        set_value(sections, key, value, key)
    return RunConfig.from_dict(sections, source)


def read_sweep(path: str | Path, words: Sequence[str]) -> tuple[RunConfig, Space]:
    """The config that all trials share, and the space that they search.

    Args:
        path: a YAML recipe.
        words: `key=low..high` with an optional `:log` or `:log2`; `key=a,b` or `key=a|b`; `key=2*other.key`;
            `key=value`.

    Raises:
        ConfigError: the recipe is not readable, or words are malformed or lead to invalid configs; lists all problems.
    """
    problems, parts, fixed = _parse_words(words)
    sections = read_sections(path, fixed)
    config, invalid = RunConfig.check(sections)
    problems += invalid
    dimensions = {part.key: part for part in parts if not isinstance(part, Multiple)}
    multiples = tuple(part for part in parts if isinstance(part, Multiple))
    bounds = {key: dimension.bounds() for key, dimension in dimensions.items()}
    for multiple in multiples:
        if multiple.base not in dimensions:
            problems.append(f"{multiple}: {multiple.base} is not swept{did_you_mean(multiple.base, dimensions)}")
        elif not all(isinstance(value, (int, float)) for value in bounds[multiple.base]):
            problems.append(f"{multiple}: expected numbers in {multiple.base}")
        else:
            bounds[multiple.key] = [multiple.value({multiple.base: value}) for value in bounds[multiple.base]]
    for key, values in bounds.items():
        converted, invalid = _try_values(sections, key, values)
        problems += invalid
        dimension = dimensions.get(key)
        if isinstance(dimension, Range) and any(isinstance(value, float) for value in converted):
            low, high = float(dimension.low), float(dimension.high)
            dimensions[key] = replace(dimension, low=low, high=high, is_int=False)
    if not dimensions and not problems:
        problems.append("nothing to sweep: give at least one key=low..high or key=a,b, such as lora.r=4..64:log2")
    if problems or config is None:
        unique = list(dict.fromkeys(problems))
        raise ConfigError("\n  ".join([f"sweep of {path}: {count(len(unique), 'problem')}", *unique]))
    return config, Space(tuple(dimensions.values()), multiples)


def _try_values(sections: dict[str, Any], key: str, values: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Each value as the config converts it, which may be an int as a float, and the problems."""
    converted, problems = [], []
    for value in values:
        changed = copy.deepcopy(sections)
        try:
            set_value(changed, key, value, key)
        except ConfigError as error:
            problems.append(str(error))
            continue
        config, invalid = RunConfig.check(changed)
        problems += invalid
        if config is not None:
            converted.append(reduce(lambda level, name: level[name], key.split("."), config.to_dict()))
    return converted, problems


def _parse_words(words: Sequence[str]) -> tuple[list[str], list[Range | Choice | Multiple], list[str]]:
    """The problems, the parts of the space, and the words that set one value."""
    problems: list[str] = []
    parts: list[Range | Choice | Multiple] = []
    fixed: list[str] = []
    seen = set()
    for word in words:
        key, equals, text = (piece.strip() for piece in word.partition("="))
        reason = FIXED.get(key) or FIXED.get(key.partition(".")[0])
        if not equals or "." not in key:
            problems.append(f"{word!r}: expected section.key=low..high, section.key=a,b or section.key=value")
        elif key in seen:
            problems.append(f"{key}: given twice")
        elif key.startswith("output.") and key != "output.plots":
            problems.append(f"{key}: a sweep sets the output folder itself; use the options of the sweep")
        else:
            try:
                part = _parse_part(key, text)
            except ConfigError as error:
                problems.append(f"{word}: {error}")
            else:
                if part is None:
                    fixed.append(f"{key}={text}")
                elif reason:
                    problems.append(f"{key}: cannot be swept: {reason}")
                else:
                    parts.append(part)
        seen.add(key)
    return problems, parts, fixed


def _parse_part(key: str, text: str) -> Range | Choice | Multiple | None:
    """The part of the space, or None for a single value."""
    if match := RANGE.fullmatch(text):
        return _parse_range(key, *match.groups())
    if match := MULTIPLE.fullmatch(text):
        return Multiple(key, _parse_number(match[1]), match[2])
    if "|" not in text and ("," not in text or text[0] in "[{\"'"):
        return None
    texts = [piece.strip() for piece in text.split("|" if "|" in text else ",")]
    if not all(texts):
        raise ConfigError("a choice is empty")
    try:
        values = [_parse_value(piece) for piece in texts]
    except ValueError:
        raise ConfigError("a choice is not valid YAML; separate choices that contain commas with |") from None
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ConfigError("a choice is given twice")
    return Choice(key, tuple(texts))


def _parse_range(key: str, low_text: str, high_text: str, scale: str | None) -> Range:
    low, high = _parse_number(low_text), _parse_number(high_text)
    if scale is not None and scale not in SCALES:
        raise ConfigError(f"expected :{' or :'.join(SCALES)}, found :{scale}{did_you_mean(scale, SCALES)}")
    if not low < high:
        raise ConfigError(f"expected low < high, found {low_text} and {high_text}")
    if scale and low <= 0:
        raise ConfigError(f"expected low > 0 for :{scale}, found {low_text}")
    found = Range(key, low, high, scale or "linear", is_int=isinstance(low, int) and isinstance(high, int))
    if scale == "log2" and not found.limits[0] < found.limits[1]:
        raise ConfigError("expected at least two powers of two between low and high")
    return found


def _parse_value(text: str) -> Any:
    # PyYAML reads 1e-3 as text.
    return _parse_number(text) if re.fullmatch(NUMBER, text) else parse_yaml(text)


def _parse_number(text: str) -> float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
