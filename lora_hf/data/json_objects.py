"""JSON that a user has written, with the place of a mistake in the error."""

from __future__ import annotations

from typing import Any

from lora_hf.core.errors import DataError
from lora_hf.core.parsing import parse_json


def parse_object(line: str, location: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        DataError: it is none; the message begins with `location`.
    """
    return checked_object(parse_value(line, location, "a JSON object on one line"), line, location)


def parse_value(text: str, location: str, what: str) -> Any:
    try:
        return parse_json(text, limit=None)
    except ValueError as error:
        raise DataError(f"{location}: not {what}: {error}") from error


def checked_object(value: Any, text: str, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{location}: expected an object such as {{"text": ...}}, found {text:.50}')
    return value
