"""The LoRA layer: it replaces a pretrained projection and holds any number of adapters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import AdapterState, BatchRouting
from lora_hf.lora.adapter_dict import AdapterDict
from lora_hf.lora.kernels.fused import Projection, Weight, can_fuse, lora_linear
from lora_hf.lora.kernels.grouped import Pair, Stack, add_grouped
from lora_hf.lora.kernels.reference import add_lora
from lora_hf.lora.quantization import QuantisedLinear, is_torchao
from lora_hf.lora.slices import Slices, block_diagonal, slice_width, split_slices

TRANSPOSED = (Conv1D, nn.Embedding)  # whose weight is (in, out)
# The types whose numbers are the weights themselves. Those of float8, as of bytes, mean nothing without their scales.
WHOLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """`(in, out)` of a linear layer, a `Conv1D` or an embedding, packed or not."""
    if isinstance(layer, QuantisedLinear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Linear):  # the weight may be packed (bitsandbytes)
        return layer.in_features, layer.out_features
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(layer, TRANSPOSED) else (columns, rows)


class LoraWeights(nn.Module):
    """A and B of one adapter at one projection, for one or several slices of its output.

    `lora_A` is `(n * r, in)` and `lora_B` `(sum of slice widths, r)`: the slices of a fused projection are stacked, and
    each has its own A, as in loralib's MergedLinear. Both are fp32, whatever the precision of the base. A starts
    Kaiming-uniform and B zero. Variants (`variants/`) are subclasses that use other factors or add other terms.
    """

    start = ""  # how A and B started (`pissa`, `olora`), if the start is not zero

    def __init__(
        self,
        in_features: int,
        slices: Slices,
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
        self.bias: nn.Parameter | None = None  # this adapter's copy of the projection's bias, if it trains one
        self.lora_bias: nn.Parameter | None = None  # PEFT's bias of B, scaled like B
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        width = sum(map(slice_width, slices))
        self.lora_A = nn.Parameter(torch.empty(len(slices) * r, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(width, r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`; rank-stabilized `lora_alpha / sqrt(r)` (rsLoRA, arXiv 2312.03732, theorem 3.2)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def plain(self) -> bool:
        """Whether the layer only adds `scaling * B A` of its `factors`."""
        return type(self).adapt is LoraWeights.adapt and self.bias is None and self.lora_bias is None

    def factors(self) -> tuple[Tensor, Tensor]:
        """The A and B to multiply, stacked like `lora_A` and `lora_B`, of any rank."""
        return self.lora_A, self.lora_B

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """The A and B of an equivalent plain LoRA, to write to a file. `load_factors` reads them back."""
        return self.lora_A, self.lora_B

    def load_factors(self, a: Tensor, b: Tensor) -> None:
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def moved(self) -> bool:
        """Whether training has changed B since the start."""
        return bool(self.lora_B.any())

    def forward(self, base_layer: nn.Module, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`: the base layer with this adapter and its bias."""
        y = self.adapt(base_layer, x)
        if self.lora_bias is not None:
            y = y + (self.scaling * self.lora_bias).to(y.dtype)
        return y if self.bias is None else y + (self.bias - base_layer.bias).to(y.dtype)  # type: ignore[operator]

    def adapt(self, base_layer: nn.Module, x: Tensor) -> Tensor:
        """`forward` without the trained bias; variants override it."""
        dropout = self.lora_dropout if self.training else 0.0
        projection = self.projection(base_layer, x)
        if projection is not None:
            return lora_linear(x, *projection, dropout)
        dropped = nn.functional.dropout(x, dropout) if dropout else x
        return add_lora(base_layer(x), dropped, *self.factors(), self.scaling, self.slices)

    def projection(self, base_layer: Any, x: Tensor) -> Projection | None:
        """The factors for `lora_linear`; None if the kernel cannot replace the reference."""
        if base_layer._forward_hooks or base_layer._forward_pre_hooks:
            return None
        weight, bias = frozen_weight(base_layer), base_layer.bias
        if not can_fuse(x, weight, bias):
            return None
        lora_A, lora_B = self.factors()
        return Projection(weight, bias, lora_A, lora_B, self.scaling, self.slices)

    def delta_weight(self, out_features: int, original: Callable[[], Tensor] | None = None) -> Tensor:
        """`scaling * B A` as an fp32 `(out, in)` matrix, zero outside the slices.

        Args:
            original: returns the base weight, fp32 `(out, in)`, for variants whose change depends on it.
        """
        a, b = self.factors()
        delta = a.new_zeros(out_features, a.shape[1])
        for columns, slice_a, slice_b in split_slices(a, b, self.slices):
            delta[columns] = slice_b @ slice_a * self.scaling
        return delta

    def merged_bias(self, base: Tensor | None) -> Tensor | None:
        """The bias that replaces the base's bias in a merge; None if that one stays."""
        if base is None or (self.bias is None and self.lora_bias is None):
            return None
        bias = base.float() if self.bias is None else self.bias
        return bias if self.lora_bias is None else bias + self.scaling * self.lora_bias

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, slices={self.slices}"


def frozen_weight(base_layer: Any) -> Weight:
    """The weight `(out, in)` or, for a packed layer, a function that unpacks it."""
    if isinstance(base_layer, QuantisedLinear):
        return base_layer.unpacker()
    return base_layer.weight.T if isinstance(base_layer, Conv1D) else base_layer.weight


@dataclass(frozen=True)
class Drift:
    """The rounding error of a merge into a packed weight (Frobenius norm), relative to the weight and to the update."""

    of_weight: float  # relative to the exact merged weight
    of_delta: float  # relative to the adapter's delta_weight: near 1, the error is as large as what was learned

    @classmethod
    def between(cls, exact: Tensor, packed: Tensor, delta: Tensor) -> Drift:
        error = float((exact - packed).norm())
        return cls(*(error / max(float(norm.norm()), torch.finfo(torch.float32).tiny) for norm in (exact, delta)))


class AdaptedModule(nn.Module):
    """A frozen module, `base_layer`, and what each adapter adds to it."""

    def __init__(self, base_layer: nn.Module, adapter_state: AdapterState) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer: Any = base_layer
        self.adapters: Any = AdapterDict()
        self.adapter_state = adapter_state

    @property
    def active(self) -> str | None:
        """The adapter that runs here in this context; None for a mix, or if this module does not have it."""
        return self.adapter_state.active(self.adapters)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)


class LoraLinear(AdaptedModule):
    """`y = base_layer(x) + (lora_alpha / r) * dropout(x) A^T B^T` with the A and B of the active adapter.

    The base layer is an `nn.Linear`, `Conv1D`, `nn.Embedding` or `QuantisedLinear`. Its weight never changes: `merge`
    creates a merged copy that runs in its place until `unmerge`, so other threads never see a half-merged weight.
    `drift` is the rounding error of a merge into a packed base.
    """

    def __init__(self, base_layer: nn.Module, adapter_state: AdapterState) -> None:
        super().__init__(base_layer, adapter_state)
        self.merged_layer: tuple[str, Any] | None = None  # the adapter and the copy, which is no submodule
        self.shared_input: Any = None  # the `shared_inputs.SharedInput` of the layers that run together with this one
        self.drift: Drift | None = None
        self.in_features, self.out_features = linear_shape(base_layer)

    @property
    def merged(self) -> str | None:
        """The adapter that is merged."""
        return None if self.merged_layer is None else self.merged_layer[0]

    @property
    def running_layer(self) -> Any:
        """The base layer or, while an adapter is merged, the merged copy."""
        return self.base_layer if self.merged_layer is None else self.merged_layer[1]

    @property
    def weight(self) -> Tensor:
        """The weight in use. A packed weight is returned as a dequantized fp32 copy."""
        return self.running_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.running_layer, "bias", None)

    @property
    def device(self) -> torch.device:
        return next(chain(self.base_layer.parameters(), self.base_layer.buffers())).device

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`, in the precision of the base layer.

        Raises:
            AdapterError: the active adapter is not the one that is merged into the base.
        """
        current, merged = self.adapter_state.current, self.merged_layer
        if merged is not None:
            if current != merged[0]:
                running = "a mix of adapters" if isinstance(current, BatchRouting) else current or "the bare base"
                raise AdapterError(
                    f"cannot run {running}: adapter {merged[0]!r} is merged into the base; unmerge it first"
                )
            return merged[1](x)
        if isinstance(current, BatchRouting):
            return self._run_mixed(x, current)
        adapters = self.adapters
        if current is None or current not in adapters:
            return self.base_layer(x)
        if self.shared_input is not None and torch.is_grad_enabled():
            y = self.shared_input.output(self, x, current)
            if y is not None:
                return y
        return adapters[current](self.base_layer, x)

    def _run_mixed(self, x: Tensor, routing: BatchRouting) -> Tensor:
        """Each item of the batch with its own adapter."""
        y = self.base_layer(x)
        # Gradients and dropout are those of each adapter alone; only inference is worth a kernel of its own.
        stack = None if torch.is_grad_enabled() else self._stack(routing, x.dtype)
        if stack is None:
            return routing.apply(
                y, x, lambda name, items, _: self.adapters[name](self.base_layer, items), self.adapters
            )
        inputs, outputs, segments = routing.items(x, y)
        return add_grouped(outputs, inputs, stack, segments.order, segments.ends).view_as(y)

    def _stack(self, routing: BatchRouting, dtype: torch.dtype) -> Stack | None:
        """The stacked weights of the adapters, cached; None if there are none, or if one is not plain LoRA."""
        key = (id(self), routing.names, dtype)
        if key not in routing.stacks:
            weights = [self.adapters[name] for name in routing.names if name in self.adapters]
            stackable = bool(weights) and all(each.plain for each in weights)
            pairs = (self._pair(name, dtype, routing.stacks) for name in routing.names) if stackable else ()
            routing.stacks[key] = Stack(tuple(pairs)) if stackable else None
        return routing.stacks[key]

    def _pair(self, name: str, dtype: torch.dtype, stacks: dict[Any, Any]) -> Pair | None:
        """The A and B of one adapter as `Stack` holds them, cached, so that another set of adapters finds them."""
        if name not in self.adapters:
            return None
        key = (id(self), name, dtype)
        if key not in stacks:
            weights = self.adapters[name]
            a, b = weights.factors()
            up = block_diagonal(b, weights.slices, self.out_features) * weights.scaling
            stacks[key] = (a.T.to(dtype), up.T.to(dtype))
        return stacks[key]

    def delta_weight(self, name: str) -> Tensor:
        """The update of the base weight by adapter `name`: fp32 `(out, in)`, even if the base is stored `(in, out)`."""
        return self.adapters[name].delta_weight(self.out_features, self.original_weight)

    def original_weight(self) -> Tensor:
        """The base weight, whether or not an adapter is merged: fp32 `(out, in)`."""
        base = self.base_layer
        if isinstance(base, QuantisedLinear):
            return base.dequantise()
        if base.weight.dtype not in WHOLE or is_torchao(base.weight):
            kind = type(base.weight).__name__ if is_torchao(base.weight) else base.weight.dtype
            raise AdapterError(
                f"{type(base).__name__}: its weight is packed ({kind}), so it can be neither merged nor decomposed; "
                "keep the adapter unmerged, or load the base unquantized and quantize it with lora_hf"
            )
        return (base.weight.T if isinstance(base, TRANSPOSED) else base.weight).detach().float()

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the active adapter to the base weight: summed in fp32, rounded once. Merging again changes nothing."""
        active, base = self.active, self.base_layer
        if active is None or self.merged == active:
            return
        delta = self.delta_weight(active)
        merged, exact = _copy_of_layer(base), self.original_weight() + delta
        if isinstance(base, QuantisedLinear):
            merged.requantise(exact)
            self.drift = Drift.between(exact, merged.dequantise(), delta)
        else:
            weight: Any = base.weight
            summed = torch.empty_like(weight).copy_(exact.T if isinstance(base, TRANSPOSED) else exact)
            merged.weight = nn.Parameter(summed, requires_grad=weight.requires_grad)
        bias = self.adapters[active].merged_bias(getattr(base, "bias", None))
        if bias is not None:
            own: Any = base.bias
            merged.bias = nn.Parameter(torch.empty_like(own).copy_(bias), requires_grad=own.requires_grad)
        self.adapter_state.merged = True
        self.merged_layer = (active, merged)

    def unmerge(self) -> None:
        """Runs the unchanged base layer again."""
        self.merged_layer = self.drift = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLinear:
        if self.merged_layer is not None:
            self.merged_layer[1]._apply(fn)
        return super()._apply(fn, recurse)


def _copy_of_layer(layer: Any) -> Any:
    """A module that shares the tensors of the first. Replacing one of them leaves the first unchanged."""
    twin = copy.copy(layer)
    twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, bound to the first module and its weight
        vars(twin).pop(name, None)
    return twin
