"""JSON that a user has written, with the place of a mistake in the error."""

from __future__ import annotations

import json
from typing import Any

from lora_hf.core.errors import DataError


def parse_object(line: str, location: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        DataError: it is none; the message begins with `location`.
    """
    return checked_object(parse_json(line, location, "a JSON object"), line, location)


def parse_json(text: str, location: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not {what}: {error}") from error


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there more than once")
    return values


def checked_object(value: Any, text: str, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{location}: expected an object such as {{"text": ...}}, found {text:.50}')
    return value
