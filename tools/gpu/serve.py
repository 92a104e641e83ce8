"""Many adapters on one base: a batch in which each row has its own, against one adapter after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.inject import inject
from lora_hf.lora.multi_adapter import mix_adapters, use_adapter
from tools.gpu.shapes import HIGHEST_ID, LOWEST_ID, Check

ADAPTERS, LENGTH = 64, 64
LORA = LoraConfig(r=16, lora_alpha=16, targets=("all",))
SAME_LOGITS = 5e-2  # of a row in the batch and alone, relative to the largest, in bf16
ROUNDS = 5


@torch.inference_mode()
def serve_mixed(check: Check, name: str = "llama-1b") -> dict[str, Any]:
    """Tokens per second of a forward pass over a row for each adapter, and whether a row's logits are its own."""
    adapters = 4 if check.rehearses else ADAPTERS
    model: Any = check.build(name, torch.bfloat16)
    names = [f"adapter{number}" for number in range(adapters)]
    with torch.inference_mode(False):
        for adapter in names:
            model = inject(model, LORA, adapter)
    torch.manual_seed(0)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.normal_(std=0.02)
    model.eval()
    ids = torch.randint(LOWEST_ID, HIGHEST_ID, (adapters, LENGTH), device=check.device)
    stacks: dict[Any, Any] = {}

    def run(rows: torch.Tensor) -> torch.Tensor:
        return model(input_ids=rows, use_cache=False, logits_to_keep=1).logits

    def mixed() -> torch.Tensor:
        with mix_adapters(model, names, stacks):
            return run(ids)

    def alone(number: int) -> torch.Tensor:
        with use_adapter(model, names[number]):
            return run(ids[number : number + 1])

    def base() -> torch.Tensor:
        with use_adapter(model, None):
            return run(ids)

    together, rows = mixed(), range(0, adapters, max(1, adapters // 4))
    apart = max(float((together[row] - alone(row)[0]).abs().max() / together[row].abs().max()) for row in rows)
    effect = float((together - base()).abs().max() / together.abs().max())
    passes: dict[str, Callable[[], Any]] = {
        "base": base,
        "mixed": mixed,
        "one_by_one": lambda: [alone(number) for number in range(adapters)],
    }
    rates = {side: adapters * LENGTH / _seconds(check, function) for side, function in passes.items()}
    return {
        "weights": check.weights[name],
        "base": name,
        "adapters": adapters,
        "tokens_per_second": rates,
        "difference": apart,
        "effect": effect,
        "holds": apart < SAME_LOGITS < effect,
    }


def _seconds(check: Check, function: Callable[[], Any]) -> float:
    """The fastest of a few rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        check.synchronize()
        start = time.monotonic()
        function()
        check.synchronize()
        best = min(best, time.monotonic() - start)
        if check.left() < 0:
            break
    return best
