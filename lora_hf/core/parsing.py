"""Reads YAML and JSON that others may have written: with limits on size, depth, and what aliases expand to.

The files of a downloaded adapter are parsed before anything else is known about them. A few hundred bytes of YAML
aliases can stand for billions of values, and deep nesting ends in a RecursionError far from its cause.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_BYTES = 1 << 18  # PyYAML reads about 100 kB per second
MAX_JSON_BYTES = 1 << 26
MAX_DEPTH = 100
MAX_NODES = 100_000  # of a YAML document, each alias counted as what it stands for
MAX_DIGITS = 1000
INT_TAG = "tag:yaml.org,2002:int"
MERGE_TAG = "tag:yaml.org,2002:merge"


def read_yaml(file: Path) -> Any:
    """Reads a YAML file in UTF-8.

    Raises:
        ValueError: invalid YAML, or a document beyond the limits.
        OSError: it cannot be read.
    """
    return parse_yaml(_read(file, MAX_YAML_BYTES))


def parse_yaml(text: str) -> Any:
    """Parses YAML.

    Raises:
        ValueError: invalid YAML, or a document beyond the limits.
    """
    _check_size(len(text), MAX_YAML_BYTES)
    try:
        loader = yaml.SafeLoader(text)  # refuses characters that YAML does not allow
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {})
        return loader.construct_document(node)
    except (yaml.YAMLError, LookupError, TypeError) as error:  # PyYAML's constructors raise the last two as well
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting, found more") from None
    finally:
        loader.dispose()


def read_json(file: Path) -> Any:
    """Reads a JSON file in UTF-8.

    Raises:
        ValueError: invalid JSON, or a document beyond the limits.
        OSError: it cannot be read.
    """
    return parse_json(_read(file, MAX_JSON_BYTES))


def parse_json(text: str, limit: int | None = MAX_JSON_BYTES) -> Any:
    """Parses JSON.

    Args:
        limit: the most characters; None for the user's own data.

    Raises:
        ValueError: invalid JSON, an object with a repeated key, or a document beyond the limits.
    """
    if limit is not None:
        _check_size(len(text), limit)
    try:
        value = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except RecursionError:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting, found more") from None
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting, found more")
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears more than once")
    return values


def _read(file: Path, limit: int) -> str:
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    _check_size(len(content), limit)
    return content.decode("utf-8-sig")


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"expected at most {limit:,} bytes, found more")


def _check_keys(keys: Iterable[yaml.ScalarNode]) -> None:
    """Raises ValueError for a repeated key: PyYAML would drop the value, or the whole section, before it."""
    seen = set()
    for key in keys:
        if key.value in seen:
            raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} appears more than once")
        seen.add(key.value)


def _expanded_size(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """The number of nodes and levels below `node`, with every alias written out.

    Args:
        known: the results by node, so that an alias is not walked again; None while a node is being counted.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError("an alias refers to a value that contains it")
        return found
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [each for pair in node.value for each in pair]
        _check_keys(key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE_TAG)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif node.tag == INT_TAG and len(node.value) > MAX_DIGITS:  # 1:1:1... is read in quadratic time
        raise ValueError(f"expected a number of at most {MAX_DIGITS} digits, found {len(node.value):,}")
    size, depth = 1, 0
    for child in children:
        inner_size, inner_depth = _expanded_size(child, known)
        size, depth = size + inner_size, max(depth, inner_depth)
        if size > MAX_NODES:
            raise ValueError(f"expected at most {MAX_NODES:,} values, found more once its aliases are written out")
    depth += isinstance(node, yaml.CollectionNode)
    if depth > MAX_DEPTH:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting, found more")
    known[id(node)] = (size, depth)
    return size, depth
