"""Training steps of one base by this library and by others, on the same rows with equal weights."""

from __future__ import annotations

import gc
import importlib.util
import math
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.heads import head_paths
from lora_hf.lora.host_batch import keep_on_host
from lora_hf.lora.inject import inject, inject_head, lora_layers
from lora_hf.models.load import quantise
from lora_hf.training.trainer import enable_optimizations
from tools.benchmark.flops import Weights, matrix_weights, step_flops
from tools.benchmark.peers import peft_config
from tools.gpu.shapes import Check, batches_of, padded

LORA = LoraConfig(r=16, lora_alpha=16, targets=("all",))
LEARNING_RATE = 1e-3
WARM_UP = 3  # steps before the clock starts
SAME_LOSS = 0.03  # relative: of bf16 against fp32, as the suite's BF16_BATCH_LOSS_RTOL
SAME_TRAINING = 0.1  # the same of the mean loss over all steps, whose batches may hold other rows

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class Side:
    """A model that is ready to train, what makes its batches, and what its forward pass runs in."""

    model: Any
    collate: Callable[[Any], Any] = padded
    autocast: Autocast = nullcontext
    grouped: bool = False
    per_weight: int = 4  # FLOPs of a step for each weight of the base (`benchmark.flops`)


def ours(check: Check, name: str, quantised: str | None = None) -> Side:
    model = check.build(name, torch.bfloat16)
    if quantised:
        model = quantise(model, quantised)
        free(check)
    model = inject(model, LORA)
    _set_factors({path: layer.adapters["default"].lora_A for path, layer in lora_layers(model).items()})
    reason = enable_optimizations(model).padded_because
    return Side(model, padded if reason else keep_on_host(padded), grouped=bool(reason))


def _frozen(check: Check, name: str) -> Side:
    """The bound for `lora`: no adapter, and the gradient goes down to the embeddings."""
    model = check.build(name, torch.bfloat16).requires_grad_(False)
    if head_paths(model):
        inject_head(model)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    reason = enable_optimizations(model).padded_because
    return Side(model, padded if reason else keep_on_host(padded), grouped=bool(reason))


def _with_peft(check: Check, name: str, dtype: torch.dtype) -> Any:
    import peft

    base = check.build(name, dtype)
    model = peft.get_peft_model(base, peft_config(LORA, base))
    _set_factors(
        {
            path.removeprefix("base_model.model."): module.lora_A["default"].weight
            for path, module in model.named_modules()
            if "default" in getattr(module, "lora_A", {})
        }
    )
    return model


def _peft_default(check: Check, name: str) -> Side:
    return Side(_with_peft(check, name, torch.float32))


def _peft_best(check: Check, name: str) -> Side:
    return Side(_with_peft(check, name, torch.bfloat16), autocast=_bf16(check), grouped=True)


def _peft_compiled(check: Check, name: str) -> Side:
    side = _peft_best(check, name)
    side.model = torch.compile(side.model, dynamic=True, backend="eager" if check.rehearses else "inductor")
    return side


def _full(check: Check, name: str) -> Side:
    return Side(check.build(name, torch.float32), autocast=_bf16(check), grouped=True, per_weight=6)


def _unsloth(check: Check, name: str) -> Side:
    """Unsloth loads its models from a folder, and changes transformers for all that comes after it."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    assert check.models is not None
    base, _ = FastLanguageModel.from_pretrained(str(check.models / name), dtype=torch.bfloat16, load_in_4bit=False)
    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"target_modules": roles, "lora_alpha": LORA.lora_alpha, "lora_dropout": 0, "bias": "none"}
    return Side(FastLanguageModel.get_peft_model(base, r=LORA.r, **options), autocast=_bf16(check), grouped=True)


SIDES: dict[str, Callable[[Check, str], Side]] = {
    "lora": ours,
    "frozen": _frozen,
    "peft-default": _peft_default,
    "peft-best": _peft_best,
    "full": _full,
    "peft-compiled": _peft_compiled,
    "unsloth": _unsloth,
}
NEEDS = {"peft-default": "peft", "peft-best": "peft", "peft-compiled": "peft", "unsloth": "unsloth"}


def unavailable(check: Check, side: str) -> str | None:
    """Why a side cannot run here."""
    package = NEEDS.get(side)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if side == "unsloth" and check.models is None:
        return "it needs --models"
    return None


def _bf16(check: Check) -> Autocast:
    return lambda: torch.autocast(check.device.type, dtype=torch.bfloat16)


def _set_factors(factors: Mapping[str, torch.Tensor]) -> None:
    """Gives each lora_A the values that its path stands for, in any library."""
    for path, factor in factors.items():
        draw = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        values = torch.empty(factor.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=draw)
        with torch.no_grad():
            factor.copy_(values)


def train(check: Check, side: Side, rows: Sequence[Any], batch_size: int, steps: int) -> dict[str, Any]:
    """Trains `steps` steps after the warm-up, fewer if the time is over.

    Returns:
        Seconds, real tokens and their rate, the peak memory, all losses, and the loss of the first rows before.
    """
    trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    groups = [{"params": trained}]  # none of a frozen language model: a group may be empty
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=check.device.type == "cuda")
    with torch.no_grad():
        side.model.eval()
        before = _loss(check, side, rows[:batch_size])
        side.model.train()
    batches = cycle(batches_of(rows, batch_size, side.grouped))
    for batch in _take(batches, WARM_UP):
        _step(check, side, optimizer, trained, batch)
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    check.synchronize()
    done: list[list[Any]] = []
    losses: list[torch.Tensor] = []
    start = time.monotonic()
    for batch in _take(batches, steps):
        losses.append(_step(check, side, optimizer, trained, batch))
        done.append(batch)
        if check.left() < 0:
            break
    check.synchronize()
    seconds = time.monotonic() - start
    tokens = sum(len(row["input_ids"]) for batch in done for row in batch)
    still = sum(not bool(each.any()) for name, each in side.model.named_parameters() if "lora_B" in name)
    return {
        "steps": len(done),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_memory": torch.cuda.max_memory_allocated() if check.device.type == "cuda" else 0,
        "loss_before": float(before),
        "losses": torch.stack(losses).float().tolist(),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "unmoved_lora_B": still,
        "rows": [row for batch in done for row in batch],
    }


def _take(batches: Iterator[Any], count: int) -> Iterator[Any]:
    return (batch for batch, _ in zip(batches, range(count), strict=False))


def _step(check: Check, side: Side, optimizer: Any, trained: list[Any], batch: Sequence[Any]) -> torch.Tensor:
    loss = _loss(check, side, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _loss(check: Check, side: Side, rows: Sequence[Any]) -> torch.Tensor:
    batch = side.collate(rows)
    if check.device.type == "cuda":
        batch = {name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in batch.items()}
    with side.autocast():
        return side.model(**send_to_device(batch, check.device, non_blocking=True)).loss


def compare(
    check: Check, name: str, rows: Sequence[Any], sides: Sequence[str], batch_size: int, steps: int, peak: float
) -> dict[str, Any]:
    """Each side in turn, and whether its losses are those of the first.

    Args:
        peak: the bf16 rate of this device in FLOP/s.
    """
    results: dict[str, Any] = {}
    longest = 0.0  # of a side, with the time to build it
    weights = matrix_weights(check.build(name, torch.bfloat16))
    free(check)
    for side in sides:
        reason = unavailable(check, side)
        if reason is None and check.left() < 1.5 * longest:
            reason = "the time of this part is over"
        if reason is not None:
            results[side] = {"skipped": reason}
            continue
        start = time.monotonic()
        results[side] = _run(check, name, side, rows, batch_size, steps, weights, peak)
        free(check)
        longest = max(longest, time.monotonic() - start)
    _note_agreement(results)
    return {"weights": check.weights[name], "batch_size": batch_size, "sides": results}


def _run(
    check: Check, name: str, side: str, rows: Sequence[Any], batch_size: int, steps: int, weights: Weights, peak: float
) -> dict[str, Any]:
    start = time.monotonic()
    try:
        with _limited(max(1.0, check.left())):
            made = SIDES[side](check, name)
            result = train(check, made, rows, batch_size, steps)
    except TimeoutError:
        return {"skipped": f"stopped after {time.monotonic() - start:.0f} s"}
    except (RuntimeError, ImportError, ValueError, TypeError, AttributeError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    flops = step_flops(weights, result.pop("rows"), made.per_weight)
    return result | {"share_of_peak": flops / result["seconds"] / peak}


def _note_agreement(results: dict[str, Any]) -> None:
    """Adds `agrees`: the loss of the same rows before training, and the mean of all losses, are those of `lora`."""
    trained = {name: result for name, result in results.items() if "losses" in result}
    for result in trained.values():
        losses = result.pop("losses")
        result["mean_loss"] = sum(losses) / len(losses)
    for name, result in trained.items() if "lora" in trained else ():
        before, mean = (
            math.isclose(result[key], trained["lora"][key], rel_tol=tolerance)
            for key, tolerance in (("loss_before", SAME_LOSS), ("mean_loss", SAME_TRAINING))
        )
        other = name in ("frozen", "full")  # which train other weights
        result["agrees"] = before and (mean or other) and not result["unmoved_lora_B"]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so long, for a compilation that nothing else would stop."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


def free(check: Check) -> None:
    gc.collect()
    if check.device.type == "cuda":
        torch.cuda.empty_cache()
