"""The modules that stand in for a pretrained projection and for a task head; each holds any number of adapters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_hf.kernels.fused import fits, lora_linear
from lora_hf.kernels.reference import add_lora

TRANSPOSED = (Conv1D, nn.Embedding)  # whose weight is (in, out)


def features(layer: nn.Module) -> tuple[int, int]:
    """`(in, out)` of an `nn.Linear`, whose weight is `(out, in)`, or a `Conv1D` or embedding with `(in, out)`."""
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(layer, TRANSPOSED) else (columns, rows)


def in_own_precision(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` of `Module.to`, `.half()`, ... without its cast: the tensor follows to the device and stays exact."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


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
        return super()._apply(in_own_precision(fn), recurse)

    def forward(self, base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`: the base layer with this adapter beside it, and with its bias."""
        y = self.adapt(base_layer, x)
        return y if self.bias is None else y + (self.bias - base_layer.bias).to(y.dtype)  # type: ignore[operator]

    def adapt(self, base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`forward` without the trained bias: what a variant changes."""
        dropout = self.lora_dropout if self.training else 0.0
        low_rank = (*self.factors(), self.scaling, self.slices)
        weight: Any = base_layer.weight
        if fits(x, weight, base_layer.bias):  # type: ignore[arg-type]
            weight = weight.T if isinstance(base_layer, Conv1D) else weight
            return lora_linear(x, weight, base_layer.bias, *low_rank, dropout)  # type: ignore[arg-type]
        dropped = nn.functional.dropout(x, dropout) if dropout else x
        return add_lora(base_layer(x), dropped, *low_rank)

    def delta_weight(self, out_features: int, original: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """`scaling * B A` as an fp32 `(out, in)` matrix, zero outside the slices.

        Args:
            original: gives the base weight, fp32 `(out, in)`, to the variants whose change depends on it.
        """
        a, b = self.factors()
        r, row = b.shape[1], 0
        delta = a.new_zeros(out_features, a.shape[1])
        for index, (start, stop) in enumerate(self.slices):
            delta[start:stop] = b[row : row + stop - start] @ a[index * r : (index + 1) * r] * self.scaling
            row += stop - start
        return delta

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, slices={self.slices}"


class LoraLinear(nn.Module):
    """`y = base_layer(x) + (lora_alpha / r) * dropout(x) A^T B^T` with the A and B of the active adapter.

    Without an active adapter it is the base layer. `train()` and `eval()` never change a weight; `merge` does, and
    `unmerge` puts the base back bit for bit.
    """

    base_layer: Any  # nn.Linear, Conv1D or nn.Embedding
    adapters: Any  # nn.ModuleDict of LoraWeights, by the adapter's name

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.merged: str | None = None
        self.unmerged_weight: torch.Tensor | None = None
        self.unmerged_bias: torch.Tensor | None = None
        self.in_features, self.out_features = features(base_layer)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`, in the precision of the base layer."""
        if self.active is None or self.merged is not None:
            return self.base_layer(x)
        return self.adapters[self.active](self.base_layer, x)

    def delta_weight(self, name: str) -> torch.Tensor:
        """What adapter `name` adds to the base weight: fp32 `(out, in)`, also where the base is stored `(in, out)`."""
        return self.adapters[name].delta_weight(self.out_features, self.original_weight)

    def original_weight(self) -> torch.Tensor:
        """The base weight as it was before any merge: fp32 `(out, in)`."""
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
        if self.unmerged_bias is not None:
            self.base_layer.bias.copy_(self.unmerged_bias)
        self.unmerged_weight = self.unmerged_bias = self.merged = None


class AdapterHead(nn.Module):
    """A task head with a trained copy per adapter, in fp32; without an active adapter it is the base's own head.

    The base's head is not a registered submodule: it is neither trained, saved nor counted while an adapter's copy
    stands in for it. It still follows the model from device to device.
    """

    base_head: Any
    heads: Any  # nn.ModuleDict, by the adapter's name

    def __init__(self, base_head: nn.Module) -> None:
        super().__init__()
        self.__dict__["base_head"] = base_head
        self.heads = nn.ModuleDict()
        self.active: str | None = None
        self.training = base_head.training

    def add(self, name: str, head: nn.Module | None = None) -> None:
        """Adds the head of adapter `name`; without `head`, a copy of the base's own."""
        self.heads[name] = (copy.deepcopy(self.base_head) if head is None else head).float().requires_grad_(True)

    def train(self, mode: bool = True) -> AdapterHead:
        self.base_head.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AdapterHead:
        self.base_head._apply(fn, recurse)
        return super()._apply(in_own_precision(fn), recurse)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the active head gives, floating-point inputs cast to its precision."""
        head = self.base_head if self.active is None else self.heads[self.active]
        dtype = next(head.parameters()).dtype

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return head(*map(cast, inputs), **{key: cast(value) for key, value in named.items()})
