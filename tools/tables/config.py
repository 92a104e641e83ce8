"""The reference of the config's keys, from the dataclasses that check them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from lora_hf.core.config.reference import config_keys as keys
from lora_hf.core.config.reference import section_docs, type_in_words
from lora_hf.core.formatting import table


def config_keys(_: Path) -> str:
    """For each section a heading and a table of its keys: type, default and meaning."""
    docs, parts = section_docs(), []
    for section, entries in groupby(keys(), lambda key: key.section):
        rows = [[f"`{key.name}`", type_in_words(key), f"`{_yaml(key.default)}`", key.doc] for key in entries]
        parts.append(f"## `{section}`\n\n{docs[section]}.\n\n{table(['key', 'type', 'default', 'meaning'], rows, 4)}")
    return "\n\n".join(parts)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)
