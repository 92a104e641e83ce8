"""The parts of the GPU check. Each runs in a process of its own: `python -m tools.gpu.parts LETTER ...`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hf.core.atomic_io import write_json_atomic
from lora_hf.core.imports import heavy_imports

with heavy_imports():
    import torch

    from tools.benchmark.flops import matmul_peak
    from tools.gpu.numbers import numeric_checks
    from tools.gpu.serve import serve_mixed
    from tools.gpu.shapes import Check, chat_rows, e2e_rows, mnli_rows, sst2_rows
    from tools.gpu.train import compare, ours, train, unavailable

QLORA_LIMIT = 24e9  # bytes of a common GPU
AGAINST = ("lora", "peft-best", "frozen", "peft-default", "full")
COMPILING = 60  # seconds that torch.compile needs at least
LARGE = ("lora", "frozen", "peft-best")

Found = Iterable[tuple[str, Any]]


def _sizes(check: Check) -> tuple[int, int, int]:
    """Rows, rows of a batch and steps."""
    return (24, 4, 2) if check.rehearses else (960, 32, 30)


def _peak(check: Check) -> float:
    """The bf16 rate of this device in FLOP/s, measured."""
    seconds, counts = (0.01, (16,)) if check.rehearses else (0.3, None)
    return max(matmul_peak(check.device, seconds, ("bf16",), counts).values())


def _train(check: Check) -> Found:
    rows, batch, steps = _sizes(check)
    peak = _peak(check)
    yield "peak", peak
    jobs = (("SST-2", "minilm", sst2_rows), ("E2E", "smollm2", e2e_rows), ("chat", "smollm2", chat_rows))
    end = check.deadline
    check.deadline -= COMPILING
    yield from _in_turn(check, jobs, AGAINST, rows, batch, steps, peak)
    check.deadline = end
    yield (
        "SST-2, compiled",
        compare(check, "minilm", sst2_rows(rows), ("lora", "peft-compiled"), batch, steps, peak),
    )


def _shapes(check: Check) -> Found:
    rows, batch, steps = _sizes(check)
    peak = _peak(check)
    jobs: list[Any] = [(name, name, mnli_rows) for name in ("roberta-base", "modernbert-base")]
    jobs += [(name, name, e2e_rows) for name in ("gpt2-medium", "llama-1b", "llama-8b")]
    yield "peak", peak
    yield from _in_turn(check, jobs, LARGE, rows, batch, min(steps, 10), peak)


def _in_turn(check: Check, jobs: Any, sides: Any, rows: int, batch: int, steps: int, peak: float) -> Found:
    """Each job with an equal share of what is left of the part."""
    end = check.deadline
    for number, (title, base, make) in enumerate(jobs):
        check.deadline = time.monotonic() + (end - time.monotonic()) / (len(jobs) - number)
        yield title, {"base": base} | compare(check, base, make(rows), sides, batch, steps, peak)


def _qlora(check: Check) -> Found:
    """An nf4 base of 8B parameters; the peak is that of training, not of packing."""
    rows, batch, steps = _sizes(check)
    result = train(check, ours(check, "llama-8b", "nf4"), e2e_rows(rows), min(batch, 8), min(steps, 10))
    del result["rows"]
    losses = result.pop("losses")
    yield from result.items()
    yield "weights", check.weights["llama-8b"]
    yield "mean_loss", sum(losses) / len(losses)
    yield "holds", result["peak_memory"] < QLORA_LIMIT and not result["unmoved_lora_B"]


def _serve(check: Check) -> Found:
    yield from serve_mixed(check).items()


def _unsloth(check: Check) -> Found:
    if reason := unavailable(check, "unsloth"):
        yield "skipped", reason
        return
    rows, batch, steps = _sizes(check)
    yield from compare(check, "smollm2", e2e_rows(rows), ("lora", "unsloth"), batch, steps, _peak(check)).items()


@dataclass(frozen=True)
class Part:
    """`run` yields what it finds, so that a part that is stopped leaves what came before."""

    title: str
    seconds: float
    run: Callable[[Check], Found]


PARTS = {
    "a": Part("numeric checks", 65, numeric_checks),
    "b": Part("training against PEFT and full fine-tuning", 175, _train),
    "c": Part("training the shapes of larger bases", 130, _shapes),
    "d": Part("an nf4 base of 8B parameters within 24 GB", 65, _qlora),
    "e": Part("64 adapters in one batch", 45, _serve),
    "u": Part("training against Unsloth", 40, _unsloth),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one part, and writes after each result all results so far."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.parts")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="on the monotonic clock")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    device = torch.device("cpu" if given.rehearse else "cuda")
    check = Check(device, given.models, given.rehearse, given.deadline, {})
    found: dict[str, Any] = {}
    try:
        for name, result in PARTS[given.part].run(check):
            found[name] = result
            write_json_atomic(given.output, {"results": found, "bases": check.weights})
    except Exception as error:  # noqa: BLE001 - the record says what failed
        found["failed"] = f"{type(error).__name__}: {error}"[:1000]
        write_json_atomic(given.output, {"results": found, "bases": check.weights})


if __name__ == "__main__":
    main()
