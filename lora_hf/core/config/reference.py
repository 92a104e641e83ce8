"""The keys of a config, described for editors (a JSON schema) and for the reference page, from the dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lora_hf.core.config.fields import field_types
from lora_hf.core.config.schema import RunConfig

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false"}
_LIST_WORDS = {str: "words", int: "integers", float: "numbers"}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a section, such as `lora.r`."""

    section: str
    name: str
    kind: Any
    default: Any
    rules: Mapping[str, Any]

    @property
    def doc(self) -> str:
        return self.rules["doc"]


def config_keys() -> Iterator[Key]:
    """Yields every key of a config, section by section."""
    for section, kind in _sections().items():
        kinds, defaults = field_types(kind), kind()
        for entry in dataclasses.fields(kind):
            yield Key(section, entry.name, kinds[entry.name], getattr(defaults, entry.name), entry.metadata)


def section_docs() -> dict[str, str]:
    """Returns the first line of each section's docstring, without its full stop."""
    return {name: (kind.__doc__ or "").splitlines()[0].rstrip(".") for name, kind in _sections().items()}


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of a config file, by which editors complete and check its keys."""
    docs = section_docs()
    sections: dict[str, Any] = {
        name: {"type": "object", "description": doc, "additionalProperties": False, "properties": {}}
        for name, doc in docs.items()
    }
    for key in config_keys():
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        described = {"description": key.doc, "default": default}
        sections[key.section]["properties"][key.name] = _json_type(key.kind, key.rules) | described
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora_hf run",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


def type_in_words(key: Key) -> str:
    """Returns what values a key takes, such as `integer >= 1`."""
    options = _options(key.kind)
    words = " or ".join(_in_words(option) for option in options if option is not types.NoneType)
    bounds = [f"{sign} {_number(key.rules[name])}" for name, sign in _SIGNS.items() if key.rules.get(name) is not None]
    return f"{words} {' and '.join(bounds)}".rstrip()


_SIGNS = {"above": ">", "low": ">=", "high": "<="}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _sections() -> dict[str, Any]:
    return field_types(RunConfig)


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _in_words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_LIST_WORDS[arguments[0]]}"
    return "mapping" if origin is dict else _WORDS[kind]


def _json_type(kind: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    options = [_plain_type(option, rules) for option in _options(kind) if option is not types.NoneType]
    if types.NoneType in _options(kind):
        options.append({"type": "null"})
    return options[0] if len(options) == 1 else {"anyOf": options}


def _plain_type(kind: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        item = {"type": ["string", "number"]} if rules.get("names") else _plain_type(arguments[0], rules)
        return {"anyOf": [item, {"type": "array", "items": item}]}
    if origin is dict:
        values = True if arguments[1] is Any else _plain_type(arguments[1], rules)
        return {"type": "object", "additionalProperties": values}
    if kind not in (int, float):
        return {"type": _JSON_TYPES[kind]}
    names = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum"}
    bounds = {word: rules[name] for name, word in names.items() if rules.get(name) is not None}
    return {"type": _JSON_TYPES[kind], **bounds}
