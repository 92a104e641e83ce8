"""Checks and measures lora_hf on a GPU in at most nine minutes: `python -m tools.gpu_check --output FILE`.

Each part runs in a process of its own with a budget in seconds. It is stopped when that is over, and skipped when too
little is left of the whole; the record says so. `--models DIR` names a folder with `minilm` and `smollm2`; other bases,
and these without it, have random weights of the same shapes. Rows have the lengths of real ones. `--rehearse` runs all
parts on the CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lora_hf.core.child_process import ChildProcesses, package_environment
from lora_hf.core.provenance import git_state, machine, version, versions
from tools.gpu.parts import PARTS

SECONDS = 520  # with the start of this process, and of its children when they are stopped, less than nine minutes
USEFUL = 0.3  # a part with less than this share of its seconds is skipped
ENDS_ITSELF = 0.9  # of a budget: what is left then is for the results
GRACE = 1.0  # seconds from SIGTERM to SIGKILL
CHILD = (sys.executable, "-m", "tools.gpu.parts")
STDERR = 2
WRONG = ('"failed"', '"stopped"', '"holds": false', '"agrees": false')


def run_parts(chosen: str, seconds: float, options: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs each part within its budget, longer ones if `seconds` is more than the usual.

    Returns:
        The result of each part, why it was skipped or when it was stopped; and where the weights of the bases are from.
    """
    end, bases = time.monotonic() + seconds, {}
    results: dict[str, Any] = {}
    for letter, part in PARTS.items():
        if letter not in chosen:
            continue
        left = end - time.monotonic()
        if left < USEFUL * part.seconds:
            results[letter] = {"title": part.title, "skipped": f"{left:.0f} s were left"}
        else:
            budget = min(left, part.seconds * max(1.0, seconds / SECONDS))
            found = _run_part(letter, budget, options)
            bases |= found.pop("bases", {})
            results[letter] = {"title": part.title} | found
        print(f"({letter}) {part.title}: {_summary(results[letter])}", file=sys.stderr, flush=True)
    return results, bases


def _run_part(letter: str, budget: float, options: list[str]) -> dict[str, Any]:
    """What the part has written when it ends, or when it is stopped at the end of its budget."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, deadline = Path(folder) / "part.json", start + ENDS_ITSELF * budget
        with ChildProcesses(grace=GRACE) as children:
            words = [*CHILD, letter, "--output", str(file), "--deadline", str(deadline), *options]
            child = children.start(words, stdin=subprocess.DEVNULL, stdout=STDERR, env=package_environment())
            try:
                code = child.wait(timeout=budget)
            except subprocess.TimeoutExpired:
                code = None
        found: dict[str, Any] = {"results": {}}
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
    found["seconds"] = time.monotonic() - start
    if code is None:
        found["stopped"] = f"after {budget:.0f} s, the budget of this part"
    elif code:
        found["results"]["failed"] = f"its process ended with {code}, where a negative number is a signal"
    return found


def _summary(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"skipped, {result['skipped']}"
    text = json.dumps(result["results"])
    failed, wrong = text.count('"failed"'), text.count('"holds": false') + text.count('"agrees": false')
    stopped = f"stopped {result['stopped']}, " if "stopped" in result else ""
    return f"{stopped}{result['seconds']:.0f} s, {failed} failed, {wrong} wrong, {text.count('skipped')} skipped"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=Path, help="a folder with minilm and smollm2; without it weights are random")
    parser.add_argument("--output", type=Path, help="the record; without it it goes to standard output")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together (%(default)s)")
    parser.add_argument("--parts", default="".join(PARTS), help="letters of the parts to run (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    given = parser.parse_args(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        print("no GPU: expected a CUDA device that torch can use; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if given.rehearse else "cuda")
    options = ["--rehearse"] if given.rehearse else []
    options += ["--models", str(given.models)] if given.models is not None else []
    start = time.monotonic()
    parts, bases = run_parts(given.parts, given.seconds, options)
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rehearsal": given.rehearse,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "device_memory": torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "machine": machine(),
        "versions": versions() | {name: version(name) for name in ("peft", "triton", "flash-attn", "unsloth")},
        "git": git_state(),
        "seconds": time.monotonic() - start,
        "bases": bases,
        "parts": parts,
    }
    text = json.dumps(record, indent=1)
    if given.output is None:
        print(text)
    else:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(f"{text}\n", encoding="utf-8")
    return int(any(sign in text for sign in WRONG))


if __name__ == "__main__":
    sys.exit(main())
