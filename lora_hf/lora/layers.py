"""The module that stands in for a pretrained projection and holds any number of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import AdapterState, BatchRouting
from lora_hf.lora.kernels.fused import Part, Weight, can_fuse, lora_linear, lora_linear_parts
from lora_hf.lora.kernels.grouped import Stack, add_grouped
from lora_hf.lora.kernels.reference import add_lora
from lora_hf.lora.precision import keep_dtype
from lora_hf.lora.quantization import Packed, QuantisedLinear, unpack
from lora_hf.lora.slices import block_diagonal, split_slices

TRANSPOSED = (Conv1D, nn.Embedding)  # whose weight is (in, out)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """`(in, out)` of an `nn.Linear`, stored `(out, in)`, or a `Conv1D` or embedding, `(in, out)`, or of one packed."""
    if isinstance(layer, QuantisedLinear):
        return layer.in_features, layer.out_features
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(layer, TRANSPOSED) else (columns, rows)


class LoraWeights(nn.Module):
    """A and B of one adapter at one projection, for one or several slices of its output.

    `lora_A` is `(n * r, in)` and `lora_B` `(sum of slice widths, r)`: the slices of a fused projection stacked, an A
    each (loralib's MergedLinear). Both are fp32 whatever the base's precision. A starts Kaiming-uniform, B zero.

    A variant (`lora_hf/variants/`) is a subclass that multiplies other factors, or adds something else.
    """

    start = ""  # what A and B started from, where their start was not nothing

    def __init__(
        self,
        in_features: int,
        slices: Sequence[tuple[int, int]],
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        device: torch.device | None = None,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self.slices = list(slices)
        self.r = r
        self.use_rslora = use_rslora
        self.bias: nn.Parameter | None = None  # the projection's bias as this adapter trains it
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        width = sum(stop - start for start, stop in slices)
        self.lora_A = nn.Parameter(torch.empty(len(slices) * r, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(width, r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`; rank-stabilised `lora_alpha / sqrt(r)` (rsLoRA, arXiv 2312.03732, theorem 3.2)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def plain(self) -> bool:
        """Whether all it does is to add `scaling * B A` of its `factors`."""
        return type(self).adapt is LoraWeights.adapt and self.bias is None

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The A and B that are multiplied, stacked as `lora_A` and `lora_B` are, of whatever rank."""
        return self.lora_A, self.lora_B

    def saved_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The A and B of a plain LoRA that equals this one, as a file holds them; `load_factors` takes them back."""
        return self.lora_A, self.lora_B

    def load_factors(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def moved(self) -> bool:
        """Whether training has changed B since the start."""
        return bool(self.lora_B.any())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoraWeights:
        return super()._apply(keep_dtype(fn), recurse)

    def forward(self, base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`: the base layer with this adapter beside it, and with its bias."""
        y = self.adapt(base_layer, x)
        return y if self.bias is None else y + (self.bias - base_layer.bias).to(y.dtype)  # type: ignore[operator]

    def adapt(self, base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`forward` without the trained bias: what a variant changes."""
        dropout = self.lora_dropout if self.training else 0.0
        low_rank = (*self.factors(), self.scaling, self.slices)
        weight = frozen_weight(base_layer)
        if can_fuse(x, weight, base_layer.bias):  # type: ignore[arg-type]
            return lora_linear(x, weight, base_layer.bias, *low_rank, dropout)  # type: ignore[arg-type]
        dropped = nn.functional.dropout(x, dropout) if dropout else x
        return add_lora(base_layer(x), dropped, *low_rank)

    def delta_weight(self, out_features: int, original: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """`scaling * B A` as an fp32 `(out, in)` matrix, zero outside the slices.

        Args:
            original: gives the base weight, fp32 `(out, in)`, to the variants whose change depends on it.
        """
        a, b = self.factors()
        delta = a.new_zeros(out_features, a.shape[1])
        for columns, slice_a, slice_b in split_slices(a, b, self.slices):
            delta[columns] = slice_b @ slice_a * self.scaling
        return delta

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, slices={self.slices}"


def frozen_weight(base_layer: Any) -> Weight:
    """`(out, in)`, or what makes it of a packed one."""
    if isinstance(base_layer, QuantisedLinear):
        return base_layer.unpacked()
    return base_layer.weight.T if isinstance(base_layer, Conv1D) else base_layer.weight


def stack_weights(weights: Sequence[LoraWeights | None], out_features: int, dtype: torch.dtype) -> Stack:
    """A and B of several adapters at one projection in one tensor each; None is an adapter that leaves it alone."""
    some = next(each for each in weights if each is not None)
    rank = max(each.factors()[0].shape[0] for each in weights if each is not None)
    rank += -rank % 8  # a grouped product wants rows of 16 bytes
    downs, ups = [], []
    for each in weights:
        if each is None:
            downs.append(some.lora_A.new_zeros(rank, some.lora_A.shape[1]))
            ups.append(some.lora_B.new_zeros(out_features, rank))
            continue
        a, b = each.factors()
        missing = rank - a.shape[0]
        up = block_diagonal(b, each.slices, out_features) * each.scaling
        downs.append(nn.functional.pad(a, (0, 0, 0, missing)))
        ups.append(nn.functional.pad(up, (0, missing)))
    down, up = torch.stack(downs).to(dtype), torch.stack(ups).to(dtype)
    return Stack(down.permute(2, 0, 1).contiguous(), up.mT.contiguous())


@dataclass(frozen=True)
class Drift:
    """What a merge into a packed weight lost to rounding, in Frobenius norms: `|asked - held|` over the norm named."""

    of_weight: float  # of the weight that was asked for
    of_delta: float  # of the adapter's delta_weight: near 1, the rounding is as large as what was learned

    @classmethod
    def between(cls, asked: torch.Tensor, held: torch.Tensor, delta: torch.Tensor) -> Drift:
        lost = float((asked - held).norm())
        return cls(*(lost / max(float(whole.norm()), torch.finfo(torch.float32).tiny) for whole in (asked, delta)))


class AdaptedModule(nn.Module):
    """A frozen module, `base_layer`, and what each adapter adds to it; which one is active, `switch` says."""

    base_layer: Any
    adapters: Any  # nn.ModuleDict, by the adapter's name

    def __init__(self, base_layer: nn.Module, switch: AdapterState) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.switch = switch

    @property
    def active(self) -> str | None:
        """The adapter that this thread runs here; None where it has none here, or runs a mixture."""
        return self.switch.active(self.adapters)


class LoraLinear(AdaptedModule):
    """`y = base_layer(x) + (lora_alpha / r) * dropout(x) A^T B^T` with the A and B of the active adapter.

    Which one is active, `switch` says, for all layers of a model at once; without one it is the base layer. `train()`
    and `eval()` never change a weight; `merge` does, and `unmerge` puts the base back bit for bit. A packed base is
    packed anew by `merge`, and `drift` says what that lost.
    """

    base_layer: Any  # nn.Linear, Conv1D, nn.Embedding or QuantisedLinear
    adapters: Any  # nn.ModuleDict of LoraWeights, by the adapter's name

    def __init__(self, base_layer: nn.Module, switch: AdapterState) -> None:
        super().__init__(base_layer, switch)
        self.merged: str | None = None
        self.unmerged_weight: torch.Tensor | None = None
        self.unmerged_packed: Packed | None = None
        self.drift: Drift | None = None
        self.unmerged_bias: torch.Tensor | None = None
        self.in_features, self.out_features = linear_shape(base_layer)

    @property
    def weight(self) -> torch.Tensor:
        """The base's own weight; a packed one is dequantised to fp32, a copy."""
        base = self.base_layer
        return base.dequantise() if isinstance(base, QuantisedLinear) else base.weight

    @property
    def device(self) -> torch.device:
        return next(chain(self.base_layer.parameters(), self.base_layer.buffers())).device

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`, in the precision of the base layer.

        Raises:
            AdapterError: another adapter than the one to run is merged into the base.
        """
        active, mixture = self.active, self.switch.routing
        if self.merged is not None:
            if active != self.merged:
                raise AdapterError(
                    f"adapter {self.merged!r} is merged into the base, which {self.switch.current!r} needs as it was; "
                    "unmerge it first"
                )
            return self.base_layer(x)
        if mixture is not None:
            return self._mixed(x, mixture)
        return self.base_layer(x) if active is None else self.adapters[active](self.base_layer, x)

    def _mixed(self, x: torch.Tensor, mixture: BatchRouting) -> torch.Tensor:
        """Each row, or each token of rows without padding, under its own adapter."""
        here = [self.adapters[name] for name in mixture.names if name in self.adapters]
        plain = all(weights.plain for weights in here)
        if here and plain and torch.is_grad_enabled() and can_fuse(x, frozen_weight(self.base_layer), self.bias):
            parts = self._parts(x, mixture)
            if parts is not None:
                return lora_linear_parts(x, frozen_weight(self.base_layer), self.bias, parts, mixture.masked)
        y = self.base_layer(x)
        if not here:
            return y
        if not plain:
            return mixture.apply(y, x, lambda name, rows, _: self.adapters[name](self.base_layer, rows), self.adapters)
        inputs, outputs, segments = mixture.places(x, y)
        return add_grouped(outputs, inputs, self._stack(mixture, x.dtype), segments.order, segments.ends).view_as(y)

    def _parts(self, x: torch.Tensor, mixture: BatchRouting) -> list[Part] | None:
        """What each adapter of the mixture multiplies; None where its places do not stand together."""
        inputs, _, segments = mixture.places(x, x)
        if segments.order is not None:
            return None
        inner, start, parts = inputs.shape[1:-1].numel(), 0, []
        for name, end in zip(mixture.names, segments.ends, strict=True):
            if name in self.adapters and end > start:
                weights = self.adapters[name]
                a, b = weights.factors()
                dropout = weights.lora_dropout if weights.training else 0.0
                parts.append(Part(start * inner, end * inner, a, b, weights.scaling, weights.slices, dropout))
            start = end
        return parts

    def _stack(self, mixture: BatchRouting, dtype: torch.dtype) -> Stack:
        """The weights of the mixture's adapters; outside training they are stacked once for all of its forwards."""
        key = (id(self), mixture.names, dtype)
        stack = mixture.stacks.get(key)
        if stack is None or torch.is_grad_enabled():
            here = dict(self.adapters.items())
            stack = stack_weights([here.get(name) for name in mixture.names], self.out_features, dtype)
            mixture.stacks[key] = stack
        return stack

    def delta_weight(self, name: str) -> torch.Tensor:
        """What adapter `name` adds to the base weight: fp32 `(out, in)`, also where the base is stored `(in, out)`."""
        return self.adapters[name].delta_weight(self.out_features, self.original_weight)

    def original_weight(self) -> torch.Tensor:
        """The base weight as it was before any merge: fp32 `(out, in)`."""
        if self.unmerged_packed is not None:
            return unpack(
                self.unmerged_packed, self.base_layer.scheme, (self.out_features, self.in_features), torch.float32
            )
        weight = self.weight if self.unmerged_weight is None else self.unmerged_weight
        return (weight.T if isinstance(self.base_layer, TRANSPOSED) else weight).detach().float()

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the active adapter to the base weight: summed in fp32, rounded once. Merging again changes nothing."""
        if self.active is None or self.merged == self.active:
            return
        self.unmerge()
        weight = self.weight
        delta = self.delta_weight(self.active)
        self.switch.merged = True
        if isinstance(self.base_layer, QuantisedLinear):
            self.unmerged_packed = self.base_layer.packed()
            asked = weight + delta
            self.base_layer.requantise(asked)
            self.drift = Drift.between(asked, self.weight, delta)
        else:
            self.unmerged_weight = weight.detach().clone()
            weight.copy_(weight.float() + (delta.T if isinstance(self.base_layer, TRANSPOSED) else delta))
        bias = self.adapters[self.active].bias
        if bias is not None and self.bias is not None:
            self.unmerged_bias = self.bias.detach().clone()
            self.bias.copy_(bias)
        self.merged = self.active

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base weight bit for bit from the copy that `merge` kept: subtracting would round once more."""
        if self.unmerged_weight is not None:
            self.weight.copy_(self.unmerged_weight)
        if self.unmerged_packed is not None:
            self.base_layer.restore(self.unmerged_packed)
        if self.unmerged_bias is not None:
            self.base_layer.bias.copy_(self.unmerged_bias)
        self.unmerged_weight = self.unmerged_packed = self.unmerged_bias = self.merged = self.drift = None
