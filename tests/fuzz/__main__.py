"""Fuzzes the reader of adapters, guided by the lines that it reaches: `python -m tests.fuzz [OPTION ...] [FOLDER]`.

Needs `pip install atheris`, which has wheels for Linux on x86-64 alone and is therefore in no extra. The options are
libFuzzer's: `-max_total_time=600` ends after ten minutes. New inputs go to FOLDER; without one, nothing is kept but an
input that breaks something, as `crash-...` in the current folder. To take what was found into the corpus:

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
LONGEST = 4000  # bytes of an input


def change(data: bytes, most: int, seed: int) -> bytes:
    """Another value in one of the three parts that are JSON, or libFuzzer's own change."""
    import atheris

    from tests.support.damaged_inputs import HOSTILE

    draws = random.Random(seed)
    parts = data.split(b"\0", 4)
    number = draws.randrange(1, 4)
    if draws.random() < 0.5 or len(parts) < 5:
        return atheris.Mutate(data, most)
    try:
        value = json.loads(parts[number])
        places = list(_places(value))
        holder, key = draws.choice(places)
        others = [inside[name] for inside, name in places]
        if draws.random() < 0.1:
            del holder[key]
        else:
            holder[key] = draws.choice([*HOSTILE, *others, 1, 2, 0.5, "q", [0, 4], [[0, 2], [2, 4]]])
        parts[number] = json.dumps(value).encode()
    except (ValueError, IndexError, RecursionError):
        return atheris.Mutate(data, most)
    return b"\0".join(parts)[:most]


def _places(value: Any) -> Any:
    """Each key or index inside, with what holds it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def keep(found: Path) -> None:
    """Takes the inputs of a folder into the corpus, under the name of how they end."""
    from tests.fuzz.harness import Harness

    harness = Harness()
    for file in sorted(found.iterdir()):
        data = file.read_bytes()
        (CORPUS / f"{harness.attempt(data)}-{sha256(data).hexdigest()[:8]}").write_bytes(data)


def main() -> None:
    """Runs until it is stopped, or something breaks."""
    import atheris

    with atheris.instrument_imports(include=["lora_hf"]):
        from tests.fuzz.harness import Harness

    harness = Harness()
    defaults = [f"-max_len={LONGEST}", "-timeout=30", "-rss_limit_mb=4000"]
    atheris.Setup([sys.argv[0], *defaults, *sys.argv[1:]], harness.attempt, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--keep"]:
        keep(Path(sys.argv[2]))
    else:
        main()
