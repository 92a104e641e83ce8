"""Which values a sweep tries: read from words such as `lora.r=4..64:log2`, and checked against the config.

Light: a mistake is told before torch and optuna are imported.
"""

from __future__ import annotations

import copy
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from lora_hf.core.config.loader import read_sections, set_value
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from optuna.trial import Trial

Scale = Literal["linear", "log", "log2"]
SCALES = ("log", "log2")
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(?::(\w*))?")
MULTIPLE = re.compile(rf"({NUMBER})\*([a-z_]+\.[\w.]+)")
# What is scored, or says nothing about the score: a sweep over these would compare what cannot be compared.
FIXED = {
    "task.name": "scores of different tasks cannot be compared",
    "task.data_dir": "scores on different rows cannot be compared",
    "task.kind": "scores of different kinds cannot be compared",
    "task.label_column": "scores on different labels cannot be compared",
    "task.label_names": "scores on different labels cannot be compared",
    "task.metric": "scores by different metrics cannot be compared",
    "generate": "decoding has no part in the score on the development rows",
}


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included; on the scale `log2` the powers of two among them."""

    key: str
    low: float
    high: float
    scale: Scale
    whole: bool

    def __str__(self) -> str:
        return f"{self.key}={self.low}..{self.high}" + ("" if self.scale == "linear" else f":{self.scale}")

    @property
    def name(self) -> str:
        """Of the drawn number: for powers of two their exponent, so that the sampler sees equal steps."""
        return f"log2({self.key})" if self.scale == "log2" else self.key

    @property
    def exponents(self) -> tuple[int, int]:
        """Of the lowest and the highest power of two."""
        return math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))

    def draw(self, trial: Trial) -> None:
        if self.scale == "log2":
            trial.suggest_int(self.name, *self.exponents)
        elif self.whole:
            trial.suggest_int(self.name, int(self.low), int(self.high), log=self.scale == "log")
        else:
            trial.suggest_float(self.name, self.low, self.high, log=self.scale == "log")

    def value(self, drawn: Mapping[str, Any]) -> float:
        """The value of the key, from what was drawn."""
        if self.scale != "log2":
            return drawn[self.name]
        power = 2.0 ** drawn[self.name]
        return int(power) if self.whole else power

    def ends(self) -> list[Any]:
        """The values that must all be good for the config."""
        return [self.value({self.name: end}) for end in (self.exponents if self.scale == "log2" else self._limits())]

    def _limits(self) -> tuple[float, float]:
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of several values, each written as YAML."""

    key: str
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key}={'|'.join(self.texts)}"

    def draw(self, trial: Trial) -> None:
        trial.suggest_categorical(self.key, self.texts)

    def value(self, drawn: Mapping[str, Any]) -> Any:
        """The value of the key, from what was drawn."""
        return _value(drawn[self.key])

    def ends(self) -> list[Any]:
        """The values that must all be good for the config."""
        return [_value(text) for text in self.texts]


@dataclass(frozen=True)
class Multiple:
    """`factor` times the value of another key."""

    key: str
    factor: float
    of: str

    def __str__(self) -> str:
        return f"{self.key}={self.factor}*{self.of}"

    def value(self, values: Mapping[str, Any]) -> float:
        """The value of the key, from that of the other; whole where it can be."""
        product = self.factor * values[self.of]
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
        """Lets the sampler choose the trial's values."""
        for dimension in self.dimensions:
            dimension.draw(trial)

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each key, from what the sampler drew."""
        values = {dimension.key: dimension.value(drawn) for dimension in self.dimensions}
        return values | {multiple.key: multiple.value(values) for multiple in self.multiples}


def with_values(config: RunConfig, values: Mapping[str, Any], source: str) -> RunConfig:
    """The config with these values in place of its own.

    Raises:
        ConfigError: they do not go together.
    """
    sections = config.to_dict()
    for key, value in values.items():
        set_value(sections, key, value, key)
    return RunConfig.from_dict(sections, source)


def read_sweep(path: str | Path, words: Sequence[str]) -> tuple[RunConfig, Space]:
    """The config that all trials share, and what they vary, from a YAML recipe and the words behind it.

    Args:
        words: `key=low..high`, with `:log` or `:log2`; `key=a,b` or `key=a|b`; `key=2*other.key`; `key=value`.

    Raises:
        ConfigError: the recipe cannot be read, or any word is malformed, or leads to a config that cannot be run; all
            problems at once.
    """
    problems, parts, fixed = _parse(words)
    sections = read_sections(path, fixed)
    config, found = RunConfig.check(sections)
    problems += found
    dimensions = tuple(part for part in parts if not isinstance(part, Multiple))
    multiples = tuple(part for part in parts if isinstance(part, Multiple))
    ends = {dimension.key: dimension.ends() for dimension in dimensions}
    for multiple in multiples:
        if multiple.of not in ends:
            problems.append(f"{multiple}: {multiple.of} is not swept{did_you_mean(multiple.of, ends)}")
        elif not all(isinstance(end, (int, float)) for end in ends[multiple.of]):
            problems.append(f"{multiple}: {multiple.of} holds no numbers")
        else:
            ends[multiple.key] = [multiple.value({multiple.of: end}) for end in ends[multiple.of]]
    for key, values in ends.items():
        for value in values:
            trial = copy.deepcopy(sections)
            try:
                set_value(trial, key, value, key)
            except ConfigError as error:
                problems.append(str(error))
            else:
                problems += RunConfig.check(trial)[1]
    if not dimensions and not problems:
        problems.append("nothing to sweep: give at least one key=low..high or key=a,b, such as lora.r=4..64:log2")
    if problems or config is None:
        told = list(dict.fromkeys(problems))
        count = f"{len(told)} problem{'s' if len(told) > 1 else ''}"
        raise ConfigError("\n  ".join([f"sweep of {path}: {count}", *told]))
    return config, Space(dimensions, multiples)


def _parse(words: Sequence[str]) -> tuple[list[str], list[Range | Choice | Multiple], list[str]]:
    """The problems, what is varied, and the words that fix a value."""
    problems: list[str] = []
    parts: list[Range | Choice | Multiple] = []
    fixed: list[str] = []
    seen = set()
    for word in words:
        key, equals, text = (piece.strip() for piece in word.partition("="))
        if not equals or "." not in key:
            problems.append(f"{word!r}: expected section.key=low..high, section.key=a,b or section.key=value")
            continue
        if key in seen:
            problems.append(f"{key}: given twice")
            continue
        seen.add(key)
        if key.startswith("output."):
            problems.append(f"{key}: a sweep names its own folders; use --output and --study")
            continue
        try:
            part = _part(key, text)
        except ConfigError as error:
            problems.append(f"{word}: {error}")
            continue
        reason = FIXED.get(key) or FIXED.get(key.partition(".")[0])
        if part is None:
            fixed.append(f"{key}={text}")
        elif reason:
            problems.append(f"{key}: cannot be swept, {reason}")
        else:
            parts.append(part)
    return problems, parts, fixed


def _part(key: str, text: str) -> Range | Choice | Multiple | None:
    """What `text` says to try; None where it is one value."""
    if match := RANGE.fullmatch(text):
        return _range(key, *match.groups())
    if match := MULTIPLE.fullmatch(text):
        return Multiple(key, _number(match[1]), match[2])
    if "|" in text:
        texts = text.split("|")
    elif "," in text and text[0] not in "[{\"'":
        texts = text.split(",")
    else:
        return None
    texts = [piece.strip() for piece in texts]
    if not all(texts):
        raise ConfigError("a choice is empty")
    try:
        values = [_value(piece) for piece in texts]
    except yaml.YAMLError:
        raise ConfigError("a choice is not valid YAML; choices that hold commas are parted by |") from None
    if any(value in values[:place] for place, value in enumerate(values)):
        raise ConfigError("a choice is given twice")
    return Choice(key, tuple(texts))


def _range(key: str, low: str, high: str, scale: str | None) -> Range:
    first, last = _number(low), _number(high)
    if scale is not None and scale not in SCALES:
        raise ConfigError(f"expected :{' or :'.join(SCALES)}, found :{scale}{did_you_mean(scale, SCALES)}")
    if not first < last:
        raise ConfigError(f"expected low < high, found {low} and {high}")
    if scale and first <= 0:
        raise ConfigError(f"expected low > 0 for :{scale}, found {low}")
    kind = _kind(key)
    whole = kind is int or (kind is not float and isinstance(first, int) and isinstance(last, int))
    if whole and not (isinstance(first, int) and isinstance(last, int)):
        raise ConfigError(f"expected whole numbers, found {low} and {high}")
    made = Range(key, first, last, scale or "linear", whole)  # type: ignore[arg-type]
    if not whole:
        made = Range(key, float(first), float(last), made.scale, whole)
    if scale == "log2" and not made.exponents[0] < made.exponents[1]:
        raise ConfigError("expected at least two powers of two between low and high")
    return made


def _value(text: str) -> Any:
    # PyYAML reads 1e-3 as text.
    return _number(text) if re.fullmatch(NUMBER, text) else yaml.safe_load(text)


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _kind(key: str) -> type | None:
    """Whether the key holds an int or a float; None where its field says neither."""
    section, *steps = key.split(".")
    kind: Any = typing.get_type_hints(RunConfig).get(section)
    for step in steps:
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            kind = typing.get_type_hints(kind).get(step) if isinstance(kind, type) else None
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    return next((option for option in options if option in (int, float)), None)
