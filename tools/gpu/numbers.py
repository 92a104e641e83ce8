"""The numeric checks of the GPU: what it computes against the definition, or against the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import ConfigError
from lora_hf.lora.inject import inject
from lora_hf.lora.kernels.attention import Rows, attend_rows
from lora_hf.lora.kernels.cross_entropy import token_losses
from lora_hf.lora.kernels.fused import STEPS, Projection, lora_linear, lora_linears
from lora_hf.lora.kernels.reference import add_lora
from lora_hf.lora.kernels.varlen import varlen_kernel
from lora_hf.lora.quantization import pack, unpack
from lora_hf.lora.unpadding import enable_unpadding
from tools.gpu.shapes import Check, batches_of, e2e_rows, padded, sst2_rows
from tools.gpu.train import ours

FP32, BF16 = 1e-4, 3e-2  # relative to the largest value; a GPU adds in another order than a CPU
SHAPE = (257, 192, 320, 16)  # tokens, in, out, r
SLICES = ([(0, 320)], [(0, 96), (160, 320)])


Found = Iterator[tuple[str, dict[str, Any]]]


def numeric_checks(check: Check) -> Found:
    """The largest difference of each check, its tolerance, and whether it holds."""
    for name in CHECKS:
        yield from _run(check, name)


def _run(check: Check, name: str) -> Found:
    try:
        for case, found in CHECKS[name](check):
            yield f"{name}{case}", found
    except ConfigError as error:  # bitsandbytes is not installed, or there is no GPU
        yield name, {"skipped": str(error)}
    except (RuntimeError, ImportError, TypeError, AttributeError, AssertionError) as error:
        yield name, {"failed": f"{type(error).__name__}: {error}"[:500]}


def _compared(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> dict[str, Any]:
    pairs = [(f.detach().float().cpu(), w.detach().float().cpu()) for f, w in zip(found, wanted, strict=True)]
    difference = max(float((f - w).abs().max() / w.abs().max().clamp(min=1e-12)) for f, w in pairs)
    return {"difference": difference, "tolerance": tolerance, "holds": difference < tolerance}


def _projection(check: Check, dtype: torch.dtype, slices: Any) -> list[Tensor]:
    """Weight, x, A, B and the gradient of the output."""
    tokens, columns, width, r = SHAPE
    torch.manual_seed(0)
    rows = sum(stop - start for start, stop in slices)
    shapes = ((width, columns), (tokens, columns), (r * len(slices), columns), (rows, r), (tokens, width))
    weight, x, a, b, upstream = (torch.randn(*shape) for shape in shapes)
    return [
        weight.to(check.device, dtype),
        x.to(check.device, dtype).requires_grad_(),
        a.to(check.device).requires_grad_(),
        b.to(check.device).requires_grad_(),
        upstream.to(check.device, dtype),
    ]


def _fused(check: Check) -> Found:
    for dtype, tolerance in ((torch.float32, FP32), (torch.bfloat16, BF16)):
        for slices in SLICES:
            sides = []
            for fused in (True, False):
                weight, x, a, b, upstream = _projection(check, dtype, slices)
                if fused:
                    y = lora_linear(x, weight, None, a, b, 1.5, slices)
                else:
                    y = add_lora(linear(x, weight), x, a, b, 1.5, slices)
                sides.append([y, *torch.autograd.grad(y, (x, a, b), upstream)])
            yield f", {dtype}, {len(slices)} slices", _compared(sides[0], sides[1], tolerance)


def _together(check: Check) -> Found:
    """Three projections of one input in one function against each alone."""
    for dtype, tolerance in ((torch.float32, FP32), (torch.bfloat16, BF16)):
        weight, x, a, b, upstream = _projection(check, dtype, SLICES[0])
        parts = [Projection(weight, None, (a * k).detach().requires_grad_(), b, k, SLICES[0]) for k in (1.0, 1.5, 2.0)]
        inputs = [x, b, *(part.lora_A for part in parts)]
        outputs = ([*lora_linears(x, parts)], [lora_linear(x, *part) for part in parts])
        sides = [[*ys, *torch.autograd.grad(ys, inputs, [upstream] * 3)] for ys in outputs]
        yield f", {dtype}", _compared(sides[0], sides[1], tolerance)


def _triton_dropout(check: Check) -> Found:
    if check.device.type != "cuda":
        raise ConfigError("its kernels run on CUDA; the suite runs them in Triton's interpreter")
    from lora_hf.lora.kernels.philox import Philox

    threshold = round(0.3 * STEPS)
    for dtype, tolerance in ((torch.float32, FP32), (torch.bfloat16, BF16)):
        _, x, a, _, upstream = _projection(check, dtype, SLICES[0])
        philox = Philox.draw(threshold)
        ones, eye = torch.ones_like(x.detach()), torch.eye(x.shape[1], device=x.device, dtype=dtype)
        keep = philox.project(ones, eye, 1.0)  # the mask itself
        down, dprojected = a.detach().to(dtype), upstream[:, : len(a)].contiguous()
        dx = torch.zeros_like(x)
        philox.add_product(dx, dprojected, down)
        found = [philox.project(x.detach(), down, 1.5), dx, philox.gradient(dprojected, x.detach())]
        kept = x.detach() * keep
        yield (
            f", {dtype}",
            _compared(found, [kept @ down.T * 1.5, dprojected @ down * keep, dprojected.T @ kept], tolerance),
        )


def _attention(check: Check) -> Found:
    """Packed rows by this device's kernel in bf16 against fp32 on the CPU."""
    lengths = (7, 64, 3, 129)
    for causal in (False, True):
        for heads in (8, 2):
            torch.manual_seed(0)
            plain = [torch.randn(count, sum(lengths), 64) for count in (8, heads, heads)]
            upstream = torch.randn(sum(lengths), 8, 64)
            sides = []
            for device, dtype in ((check.device, torch.bfloat16), (torch.device("cpu"), torch.float32)):
                inputs = [tensor.to(device, dtype).requires_grad_() for tensor in plain]
                output = attend_rows(inputs[0], inputs[1], inputs[2], Rows(lengths, device), is_causal=causal)
                sides.append([output, *torch.autograd.grad(output, inputs, upstream.to(device, dtype))])
            kernel = varlen_kernel(torch.empty(1, 8, 64, dtype=torch.bfloat16, device=check.device), 0.0)
            found = _compared(sides[0], sides[1], BF16) | {"kernel": str(getattr(kernel, "func", "groups"))}
            yield f", {'causal' if causal else 'full'}, {heads} key heads", found


def _losses(check: Check) -> Found:
    torch.manual_seed(0)
    plain, weight, targets = torch.randn(600, 64), torch.randn(1000, 64), torch.randint(1000, (600,))
    sides = []
    for device in (check.device, torch.device("cpu")):
        hidden = plain.to(device).requires_grad_()
        losses, _ = token_losses(hidden, weight.to(device), targets.to(device), 0.1)
        sides.append([losses, *torch.autograd.grad(losses.sum(), hidden)])
    yield "", _compared(sides[0], sides[1], FP32)


def _unpadded_step(check: Check) -> Found:
    """Loss and gradients of a whole model without padding against the padded batch, in fp32."""
    for name, rows in (("minilm", sst2_rows(8)), ("smollm2", e2e_rows(8))):
        sides = []
        for unpadded in (True, False):
            model = inject(check.build(name, torch.float32), LoraConfig(r=4, targets=("all",))).eval()
            torch.manual_seed(1)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.02)
            if unpadded:
                enable_unpadding(model)
            loss = model(**{key: value.to(check.device) for key, value in padded(rows).items()}).loss
            loss.backward()
            sides.append([loss, *(each.grad for each in model.parameters() if each.grad is not None)])
        yield f", {name}", _compared(sides[0], sides[1], 10 * FP32)


def _packed(check: Check) -> Found:
    torch.manual_seed(0)
    weight = torch.randn(128, 192)
    for scheme in ("int8", "nf4"):
        sides = [
            [unpack(pack(weight.to(device), scheme), scheme, (128, 192), torch.float32)]
            for device in (check.device, torch.device("cpu"))
        ]
        yield f", {scheme}", _compared(sides[0], sides[1], FP32)


def _waits(check: Check) -> Found:
    """A step during which torch raises an error if the host waits for the GPU."""
    for name, rows in (("minilm", sst2_rows(16)), ("smollm2", e2e_rows(8))):
        side = ours(check, name)
        trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
        for number, batch in enumerate(batches_of(rows, len(rows)) * 3):
            collated = side.collate(batch)
            if check.device.type == "cuda":
                collated = {
                    key: each.pin_memory() if isinstance(each, Tensor) else each for key, each in collated.items()
                }
            with _no_waiting(check) if number else _nothing():
                moved = {
                    key: each.to(check.device, non_blocking=True) if isinstance(each, Tensor) else each
                    for key, each in collated.items()
                }
                side.model(**moved).loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
        yield f", {name}", {"holds": True, "checked": check.device.type == "cuda"}


@contextmanager
def _no_waiting(check: Check) -> Iterator[None]:
    if check.device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


CHECKS: dict[str, Callable[[Check], Found]] = {
    "fused projection": _fused,
    "projections of one input": _together,
    "Triton dropout": _triton_dropout,
    "packed attention": _attention,
    "chunked loss": _losses,
    "packed weights": _packed,
    "unpadded step": _unpadded_step,
    "a step without waiting": _waits,
}
