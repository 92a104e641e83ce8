"""DoRA: the magnitude of each output column is trained apart from its direction.

`W' = m * (W + scaling * B A) / ||W + scaling * B A||`, arXiv 2402.09353, equation 5; the norm is taken of each row of
the `(out, in)` weight and is a constant for the gradient (section 4.3), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_hf.lora.layers import LoraWeights
from lora_hf.lora.slices import split_slices

TINY = torch.finfo(torch.float32).tiny  # a row of zeros has a norm to divide by


class DoraWeights(LoraWeights):
    """LoRA's A and B, and `lora_magnitude_vector`, `(sum of slice widths,)`: one number an adapted output column.

    It starts as the norms of `weight`, fp32 `(out, in)`, so that the adapter changes nothing at first.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        slices: Sequence[tuple[int, int]],
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(weight.shape[1], slices, r, lora_alpha, lora_dropout, weight.device, use_rslora)
        self.lora_magnitude_vector = nn.Parameter(self.norms(weight))

    @torch.no_grad()
    def norms(self, weight: torch.Tensor) -> torch.Tensor:
        """`||W + scaling * B A||` of each adapted output column of `weight`, `(out, in)`: fp32 `(sum of widths,)`."""
        a, b = self.factors()
        norms = []
        for columns, slice_a, slice_b in split_slices(a, b, self.slices):
            adapted = torch.addmm(weight[columns].float(), slice_b, slice_a, alpha=self.scaling)
            norms.append(torch.linalg.vector_norm(adapted, dim=1))
        return torch.cat(norms).clamp_min(TINY)

    def adapt(self, base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`: `m / norm` times what plain LoRA gives, beside the bias.

        Dropout acts on the input of A alone. PEFT also drops it in `(m / norm - 1) W x`, which is the same on average
        and takes a second product with W.
        """
        y = super().adapt(base_layer, x)
        weight: Any = base_layer.weight
        bias: Any = base_layer.bias
        gain = self.lora_magnitude_vector / self.norms(weight.T if isinstance(base_layer, Conv1D) else weight) - 1
        # As a sum, a magnitude that is still the norm leaves y as it is, bit for bit and in any precision.
        return y + self._placed(gain, y.shape[-1]).to(y.dtype) * (y if bias is None else y - bias)

    def delta_weight(self, out_features: int, original: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """`m (W + scaling * B A) / norm - W` as an fp32 `(out, in)` matrix, zero outside the slices."""
        if original is None:
            raise TypeError("what DoRA adds depends on the base weight: ask LoraLinear.delta_weight")
        weight, delta = original(), super().delta_weight(out_features)
        gain = self._placed(self.lora_magnitude_vector / self.norms(weight) - 1, out_features)[:, None]
        return delta + gain * (weight + delta)

    def magnitudes(self, weight: torch.Tensor) -> torch.Tensor:
        """`(out,)` as PEFT's file has them: a column that is not adapted has the norm of its weight."""
        whole = torch.linalg.vector_norm(weight, dim=1)
        return whole.index_copy(0, self._columns(whole.device), self.lora_magnitude_vector.detach())

    def load_magnitudes(self, whole: torch.Tensor) -> None:
        """Takes its own columns of PEFT's `(out,)`."""
        self.lora_magnitude_vector.data.copy_(whole[self._columns(whole.device)])

    def _columns(self, device: torch.device) -> torch.Tensor:
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.slices])

    def _placed(self, values: torch.Tensor, out_features: int) -> torch.Tensor:
        """`(out,)`, zero at the columns that are not adapted."""
        return values.new_zeros(out_features).index_copy(0, self._columns(values.device), values)
