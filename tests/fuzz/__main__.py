"""Fuzzes the loading of adapters, guided by code coverage: `python -m tests.fuzz [OPTION ...] [FOLDER]`.

It needs `pip install atheris`, which is in no extra because its wheels are for Linux on x86-64 only. The options are
those of libFuzzer: `-max_total_time=600` stops after ten minutes. New inputs go to FOLDER. Without it, only inputs that
break something are saved, as `crash-...` in the current folder. To add new inputs to the corpus:

    python -m tests.fuzz -max_total_time=600 found tests/fuzz/corpus
    python -m tests.fuzz --keep found
"""

from __future__ import annotations

import json
import random
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
MAX_BYTES = 4000  # of an input


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Replaces or deletes a value in one of the three JSON parts, or mutates the bytes as libFuzzer does."""
    import atheris

    from tests.support.damaged_inputs import HOSTILE

    draws = random.Random(seed)
    parts = data.split(b"\0", 4)
    number = draws.randrange(1, 4)
    if draws.random() < 0.5 or len(parts) < 5:
        return atheris.Mutate(data, max_size)
    try:
        value = json.loads(parts[number])
        items = list(_items(value))
        container, key = draws.choice(items)
        others = [container[key] for container, key in items]
        if draws.random() < 0.1:
            del container[key]
        else:
            container[key] = draws.choice([*HOSTILE, *others, 1, 2, 0.5, "q", [0, 4], [[0, 2], [2, 4]]])
        parts[number] = json.dumps(value).encode()
    except (ValueError, IndexError, RecursionError):
        return atheris.Mutate(data, max_size)
    return b"\0".join(parts)[:max_size]


def _items(value: Any) -> Any:
    """Each dict or list at any depth, with each of its keys or indices."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _items(inner)


def add_to_corpus(folder: Path) -> None:
    """Adds the inputs of a folder to the corpus, named after their outcome."""
    from tests.fuzz.harness import Harness

    harness = Harness()
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        (CORPUS / f"{harness.run(data)}-{sha256(data).hexdigest()[:8]}").write_bytes(data)


def main() -> None:
    """Runs until it is stopped, or until an input breaks something."""
    import atheris

    with atheris.instrument_imports(include=["lora_hf"]):
        from tests.fuzz.harness import Harness

    harness = Harness()
    defaults = [f"-max_len={MAX_BYTES}", "-timeout=30", "-rss_limit_mb=4000"]
    atheris.Setup([sys.argv[0], *defaults, *sys.argv[1:]], harness.run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--keep"]:
        add_to_corpus(Path(sys.argv[2]))
    else:
        main()
