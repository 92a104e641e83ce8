"""The fields of a config section: their ranges, and the checks of their values."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from lora_hf.core.errors import ConfigError, did_you_mean


def setting(default: Any, doc: str, **rules: Any) -> Any:
    """Returns a field of a config section.

    Args:
        default: a dict is copied for each section.
        doc: what the key means, in one line; the reference of the config and editors show it.
        rules: `low <= value <= high` and `value > above`; `names=True` for names, which may look like numbers; and
            `check`, a function that returns what is wrong with a value, or "".
    """
    metadata = {"doc": doc, **rules}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base class of config sections: checks its values when it is created, from a file or in Python alike."""

    def __post_init__(self) -> None:
        values, problems = _convert_fields(type(self), vars(self))
        if problems:
            raise ConfigError("; ".join(problems))
        for key, value in values.items():
            object.__setattr__(self, key, value)  # sections are frozen


def build_section(
    section: type, values: Any, hint_for_key: Callable[[str], str] | None = None
) -> tuple[Any, list[str]]:
    """Builds a section from a mapping and lists the problems with it; with problems the section is None.

    Args:
        hint_for_key: returns what to add to the message about an unknown key; by default the nearest known key.
    """
    if not isinstance(values, dict):
        return None, [f"*: expected keys and values, found {describe_value(values)}"]
    known = [entry.name for entry in dataclasses.fields(section)]
    problems = [
        f"{key}: unknown key{hint_for_key(str(key)) if hint_for_key else did_you_mean(str(key), known)}"
        for key in values
        if key not in known
    ]
    values, invalid = _convert_fields(section, {key: value for key, value in values.items() if key in known})
    problems += invalid
    return (None if problems else section(**values)), problems


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """The type of each field of a dataclass.

    `typing.get_type_hints` fails on an `InitVar` in Python 3.10, until some library has patched it.
    """
    types_: dict[str, Any] = {}
    for each in reversed(section.__mro__):
        types_ |= inspect.get_annotations(each, eval_str=True)
    return {entry.name: types_[entry.name] for entry in dataclasses.fields(section)}


def _convert_fields(section: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    rules = {entry.name: entry.metadata for entry in dataclasses.fields(section)}
    return _convert_all(values, field_types(section), rules)


def _convert_all(
    values: Mapping[str, Any], kinds: Mapping[str, Any], rules: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the values in the types of their keys, and `key: problem` for each invalid one."""
    converted, problems = {}, []
    for key, value in values.items():
        check = rules[key].get("check")
        try:
            converted[key] = _convert(value, kinds[key], rules[key])
            problem = check(converted[key]) if check else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            problems.append(f"{key}: {problem}")
    return converted, problems


def _convert(value: Any, kind: Any, rules: Mapping[str, Any]) -> Any:
    """Returns the value in the type `kind`; a ValueError says what was expected and what was found."""
    # `Literal[...] | None` is a Union of typing, `str | None` one of types.
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if value is None and types.NoneType in options:
        return None
    kinds = [option for option in options if option is not types.NoneType]
    kind = kinds[-1] if isinstance(value, dict) else kinds[0]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
        near = did_you_mean(value, arguments) if isinstance(value, str) else ""
        expected = f"one of {', '.join(arguments)}" if len(kinds) == 1 else f"{arguments[0]}, or names with values"
        raise ValueError(f"expected {expected}, found {describe_value(value)}{near}")
    if rules.get("names"):
        value = _numbers_as_text(value)
    if origin is tuple and arguments[0] is float:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert_number(item, float, rules) for item in items)
    if origin is tuple:
        items = [value] if type(value) is arguments[0] else value
        if isinstance(items, (list, tuple)):
            others = [item for item in items if type(item) is not arguments[0]]
            if not others:
                return tuple(items)
            value = others[0]
        expected = "a word or a list of words" if arguments[0] is str else "a whole number or a list of whole numbers"
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value if arguments[1] is Any else _convert_dict(value, arguments[1], rules)
        expected = "keys and values"
    elif kind in (int, float):
        return _convert_number(value, kind, rules)
    else:
        if isinstance(value, kind):
            return value
        expected = "true or false" if kind is bool else "text"
    is_text = kind is str or (origin is tuple and arguments[0] is str)
    raise ValueError(f"expected {expected}, found {describe_value(value)}{_quote_hint(value) if is_text else ''}")


def _numbers_as_text(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_numbers_as_text(item) for item in value]
    if isinstance(value, dict):
        return {_numbers_as_text(key): item for key, item in value.items()}
    is_number = type(value) is int or (type(value) is float and math.isfinite(value))
    return str(value) if is_number else value


def _quote_hint(value: Any) -> str:
    """Returns what to do about a word that YAML 1.1 takes for something else."""
    if isinstance(value, bool):
        words = "yes, on and true" if value else "no, off and false"
        return f" (YAML reads {words} as {str(value).lower()}: put the word into quotes)"
    return " (put it into quotes)" if isinstance(value, datetime.date) else ""


def _convert_dict(values: dict[str, Any], kind: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    bounds = {
        name: rules[name] for name in ("low", "high", "above") if name in rules
    }  # the check is one of the whole dict
    converted, problems = _convert_all(values, dict.fromkeys(values, kind), dict.fromkeys(values, bounds))
    if problems:
        raise ValueError("; ".join(problems))
    return converted


def _convert_number(value: Any, kind: type, rules: Mapping[str, Any]) -> float:
    low, high, above = rules.get("low"), rules.get("high"), rules.get("above")
    expected = "a number" if kind is float else "a whole number"
    expected += f" > {above}" if above is not None else ""
    expected += f" >= {low}" if low is not None else ""
    expected += f" and <= {high}" if high is not None else ""
    number: Any = None if isinstance(value, bool) else value
    if kind is float:
        try:
            number = float(number)  # PyYAML reads 5e-4 as text: YAML 1.1 wants 5.0e-4
        except (TypeError, ValueError, OverflowError):
            number = None
    if not isinstance(number, kind):
        raise ValueError(f"expected {expected}, found {describe_value(value)}")
    inside = (low is None or number >= low) and (high is None or number <= high) and (above is None or number > above)
    if not inside or (kind is float and not math.isfinite(number)):
        raise ValueError(f"expected {expected}, found {value}")
    return number


def describe_value(value: Any) -> str:
    """Returns how a message shows a value: its kind, or the value itself."""
    # Aliases let a few lines of YAML make a list of billions of words, so a list is never written out.
    descriptions = {dict: "keys and values", list: "a list", type(None): "nothing"}
    return descriptions.get(type(value)) or (str(value).lower() if isinstance(value, bool) else repr(value))
