"""The values of a config: a field with its range, and what is wrong with a value."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any, Literal

from lora_hf.core.errors import ConfigError, did_you_mean


def bounded(default: Any, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """A field with its range: `low <= value <= high`, and `value > above`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


class Section:
    """Checks its own values when built, so that a config made in Python is held to the same rules as a file."""

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        problems = []
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value, problem = _checked(getattr(self, entry.name), kinds[entry.name], entry.metadata)
            if problem:
                problems.append(f"{entry.name}: {problem}")
            else:
                object.__setattr__(self, entry.name, value)
        if problems:
            raise ConfigError("; ".join(problems))


def build_section(
    kind: type, values: Any, hint: Callable[[str, Iterable[str]], str] = did_you_mean
) -> tuple[Any, list[str]]:
    """One section from its mapping, with the problems found; the section is None where there are any.

    Args:
        hint: what to add about an unknown key, given it and the known ones.
    """
    if not isinstance(values, dict):
        return None, [f"*: expected keys and values, found {kind_of(values)}"]
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    kinds = typing.get_type_hints(kind)
    problems = []
    for key, value in values.items():
        if key not in known:
            problems.append(f"{key}: unknown key{hint(str(key), known)}")
            continue
        _, problem = _checked(value, kinds[key], known[key].metadata)
        if problem:
            problems.append(f"{key}: {problem}")
    return (None if problems else kind(**values)), problems


def _checked(value: Any, kind: Any, rules: typing.Mapping[str, Any]) -> tuple[Any, str]:
    """The value in its field's type, and what is wrong with it (an empty string where nothing is)."""
    value, problem = _typed(value, kind, rules)
    if not problem and "check" in rules:
        problem = rules["check"](value)
    return value, problem


def _typed(value: Any, kind: Any, bounds: typing.Mapping[str, Any]) -> tuple[Any, str]:
    # `Literal[...] | None` is a Union of typing, `str | None` one of types.
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    options = typing.get_args(kind) if union else (kind,)
    if value is None and types.NoneType in options:
        return None, ""
    kind = next(option for option in options if option is not types.NoneType)
    origin = typing.get_origin(kind)
    if origin is Literal:
        words = typing.get_args(kind)
        near = did_you_mean(str(value), words)
        return value, "" if value in words else f"expected one of {', '.join(words)}, found {value!r}{near}"
    if origin is tuple:
        item = typing.get_args(kind)[0]
        noun, nouns = ("a word", "words") if item is str else ("a whole number", "whole numbers")
        value = [value] if type(value) is item else value
        good = isinstance(value, (list, tuple)) and all(type(entry) is item for entry in value)
        return (tuple(value), "") if good else (value, f"expected {noun} or a list of {nouns}, found {kind_of(value)}")
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return value, f"expected keys and values, found {kind_of(value)}"
        inner = typing.get_args(kind)[1]
        if inner is Any:
            return value, ""
        typed = {key: _typed(entry, inner, bounds) for key, entry in value.items()}
        problems = [f"{key}: {problem}" for key, (_, problem) in typed.items() if problem]
        return {key: entry for key, (entry, _) in typed.items()}, "; ".join(problems)
    if kind is float:
        return _number(_as_float(value), value, "a number", bounds)
    if kind is int:
        whole = value if isinstance(value, int) and not isinstance(value, bool) else None
        return _number(whole, value, "a whole number", bounds)
    expected = {str: "text", bool: "true or false"}[kind]
    return value, "" if isinstance(value, kind) else f"expected {expected}, found {kind_of(value)}"


def _as_float(value: Any) -> float | None:
    # PyYAML reads 5e-4 as text (YAML 1.1 wants 5.0e-4), and everybody writes 5e-4.
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _number(number: Any, value: Any, noun: str, bounds: typing.Mapping[str, Any]) -> tuple[Any, str]:
    low, high, above = bounds.get("low"), bounds.get("high"), bounds.get("above")
    wanted = noun
    if above is not None:
        wanted += f" > {above}"
    if low is not None:
        wanted += f" >= {low}"
    if high is not None:
        wanted += f" and <= {high}"
    if number is None:
        return value, f"expected {wanted}, found {kind_of(value)}"
    inside = (
        math.isfinite(number)
        and (low is None or number >= low)
        and (high is None or number <= high)
        and (above is None or number > above)
    )
    return number, "" if inside else f"expected {wanted}, found {value}"


def kind_of(value: Any) -> str:
    """A value in a message: what it is, or itself."""
    words = {dict: "keys and values", list: "a list", type(None): "nothing", bool: f"{str(value).lower()}"}
    return words.get(type(value), repr(value))
