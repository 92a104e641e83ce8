"""Checks and measures lora_hf on a GPU in at most nine minutes: `python -m tools.gpu_check --output FILE`.

Each part has seconds of its own and is skipped, saying so, when too little is left of the whole. `--models DIR` names
a folder with `minilm` and `smollm2`; other bases, and these without it, have random weights of the same shapes. Rows
have the lengths of real ones. `--rehearse` runs all parts on the CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lora_hf.core.provenance import git_state, machine, version, versions
from tools.benchmark.flops import matmul_peak
from tools.gpu.numbers import numeric_checks
from tools.gpu.serve import serve_mixed
from tools.gpu.shapes import Check, chat_rows, e2e_rows, mnli_rows, sst2_rows
from tools.gpu.train import compare, free, ours, train, unavailable

SECONDS = 540
USEFUL = 0.3  # a part with less than this share of its seconds is skipped
QLORA_LIMIT = 24e9  # bytes of a common GPU
AGAINST = ("lora", "peft-best", "frozen", "peft-default", "full")
COMPILING = 60  # seconds that torch.compile needs at least
LARGE = ("lora", "frozen", "peft-best")


def _sizes(check: Check) -> tuple[int, int, int]:
    """Rows, rows of a batch and steps."""
    return (24, 4, 2) if check.rehearses else (960, 32, 30)


def _peak(check: Check) -> float:
    """The bf16 rate of this device in FLOP/s, measured."""
    return max(matmul_peak(check.device, 0.01 if check.rehearses else 0.3, ("bf16",)).values())


def _numbers(check: Check) -> dict[str, Any]:
    return numeric_checks(check)


def _train(check: Check) -> dict[str, Any]:
    rows, batch, steps = _sizes(check)
    peak = _peak(check)
    results: dict[str, Any] = {"peak": peak}
    jobs = (("SST-2", "minilm", sst2_rows), ("E2E", "smollm2", e2e_rows), ("chat", "smollm2", chat_rows))
    end = check.deadline
    check.deadline -= COMPILING
    results |= _in_turn(check, jobs, AGAINST, rows, batch, steps, peak)
    check.deadline = end
    compiled = compare(check, "minilm", sst2_rows(rows), ("lora", "peft-compiled"), batch, steps, peak)
    return results | {"SST-2, compiled": compiled}


def _shapes(check: Check) -> dict[str, Any]:
    rows, batch, steps = _sizes(check)
    peak = _peak(check)
    jobs: list[Any] = [(name, name, mnli_rows) for name in ("roberta-base", "modernbert-base")]
    jobs += [(name, name, e2e_rows) for name in ("gpt2-medium", "llama-1b", "llama-8b")]
    return {"peak": peak} | _in_turn(check, jobs, LARGE, rows, batch, min(steps, 10), peak)


def _in_turn(check: Check, jobs: Any, sides: Any, rows: int, batch: int, steps: int, peak: float) -> dict[str, Any]:
    """Each job with an equal share of what is left of the part."""
    results, end = {}, check.deadline
    for number, (title, base, make) in enumerate(jobs):
        check.deadline = time.monotonic() + (end - time.monotonic()) / (len(jobs) - number)
        results[title] = {"base": base} | compare(check, base, make(rows), sides, batch, steps, peak)
    return results


def _qlora(check: Check) -> dict[str, Any]:
    """An nf4 base of 8B parameters; the peak is that of training, not of packing."""
    rows, batch, steps = _sizes(check)
    result = train(check, ours(check, "llama-8b", "nf4"), e2e_rows(rows), min(batch, 8), min(steps, 10))
    del result["rows"]
    losses = result.pop("losses")
    return result | {
        "weights": check.weights["llama-8b"],
        "mean_loss": sum(losses) / len(losses),
        "holds": result["peak_memory"] < QLORA_LIMIT and not result["unmoved_lora_B"],
    }


def _unsloth(check: Check) -> dict[str, Any]:
    if reason := unavailable(check, "unsloth"):
        return {"skipped": reason}
    rows, batch, steps = _sizes(check)
    return compare(check, "smollm2", e2e_rows(rows), ("lora", "unsloth"), batch, steps, _peak(check))


@dataclass(frozen=True)
class Part:
    title: str
    seconds: float
    run: Callable[[Check], dict[str, Any]]


PARTS = {
    "a": Part("numeric checks", 70, _numbers),
    "b": Part("training against PEFT and full fine-tuning", 180, _train),
    "c": Part("training the shapes of larger bases", 130, _shapes),
    "d": Part("an nf4 base of 8B parameters within 24 GB", 70, _qlora),
    "e": Part("64 adapters in one batch", 50, serve_mixed),
    # The last one: it changes transformers.
    "u": Part("training against Unsloth", 40, _unsloth),
}


def run_parts(check: Check, chosen: str, seconds: float) -> dict[str, Any]:
    """The result of each part, why it was skipped, or how it failed."""
    end, results = time.monotonic() + seconds, {}
    for letter, part in PARTS.items():
        if letter not in chosen:
            continue
        left = end - time.monotonic()
        if left < USEFUL * part.seconds:
            results[letter] = {"title": part.title, "skipped": f"{left:.0f} s were left"}
        else:
            start = time.monotonic()
            check.deadline = start + (left if check.rehearses else min(part.seconds, left))
            try:
                found = part.run(check)
            except Exception as error:  # noqa: BLE001 - the other parts are to run, and the record says what failed
                found = {"failed": f"{type(error).__name__}: {error}"[:1000]}
            results[letter] = {"title": part.title, "seconds": time.monotonic() - start, "results": found}
            free(check)
        print(f"({letter}) {part.title}: {_summary(results[letter])}", file=sys.stderr, flush=True)
    return results


def _summary(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"skipped, {result['skipped']}"
    text = json.dumps(result["results"])
    failed, wrong = text.count('"failed"'), text.count('"holds": false') + text.count('"agrees": false')
    return f"{result['seconds']:.0f} s, {failed} failed, {wrong} wrong, {text.count('skipped')} skipped"


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
    check = Check(device, given.models, given.rehearse, 0.0, {})
    start = time.monotonic()
    parts = run_parts(check, given.parts, given.seconds)
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
        "bases": check.weights,
        "parts": parts,
    }
    text = json.dumps(record, indent=1)
    if given.output is None:
        print(text)
    else:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(f"{text}\n", encoding="utf-8")
    return int('"failed"' in text or '"holds": false' in text or '"agrees": false' in text)


if __name__ == "__main__":
    sys.exit(main())
