"""DoRA: the magnitude of each output column is trained apart from its direction.

`W' = m * (W + scaling * B A) / ||W + scaling * B A||`, arXiv 2402.09353, equation 5. The norm is that of each row of
the `(out, in)` weight and a constant for the gradient (section 4.3), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_hf.lora.layers import LoraWeights, frozen_weight
from lora_hf.lora.slices import column_indices, split_slices

TINY = torch.finfo(torch.float32).tiny  # the norm of a row of zeros, which is divided by


class DoraWeights(LoraWeights):
    """LoRA's A and B, and `lora_magnitude_vector`, `(sum of slice widths,)`: one number for each adapted output column.

    It starts as the norms of `weight`, fp32 `(out, in)`, so the adapter changes nothing at first.
    """

    def __init__(self, weight: Tensor, *plain: Any) -> None:
        super().__init__(*plain)
        self.lora_magnitude_vector = nn.Parameter(self.norms(weight))

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """`||W + scaling * B A||` of each adapted output column of `weight`, `(out, in)`: fp32 `(sum of widths,)`."""
        norms = []
        for columns, slice_a, slice_b in split_slices(*self.factors(), self.slices):
            adapted = torch.addmm(weight[columns].float(), slice_b, slice_a, alpha=self.scaling)
            norms.append(torch.linalg.vector_norm(adapted, dim=1))
        return torch.cat(norms).clamp_min(TINY)

    def adapt(self, base_layer: Any, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`: the output of plain LoRA without the bias times `m / norm`, plus the bias.

        Dropout acts on the input of A alone. PEFT also drops it in `(m / norm - 1) W x`, which has the same mean and
        takes a second product with W.
        """
        y = super().adapt(base_layer, x)
        weight, bias = frozen_weight(base_layer), base_layer.bias
        norms = self.norms(weight if isinstance(weight, Tensor) else weight(torch.float32))
        gain = self.lora_magnitude_vector / norms - 1
        # Written as a sum, a magnitude that is still the norm leaves y unchanged, bit for bit and in any precision.
        return y + self._scatter(gain, y.shape[-1]).to(y.dtype) * (y if bias is None else y - bias)

    def delta_weight(self, out_features: int, original: Callable[[], Tensor] | None = None) -> Tensor:
        """`m (W + scaling * B A) / norm - W` as an fp32 `(out, in)` matrix, zero outside the slices."""
        if original is None:
            raise TypeError("the delta weight of DoRA depends on the base weight; use LoraLinear.delta_weight")
        weight, delta = original(), super().delta_weight(out_features)
        gain = self._scatter(self.lora_magnitude_vector / self.norms(weight) - 1, out_features)[:, None]
        return delta + gain * (weight + delta)

    def magnitudes(self, weight: Tensor) -> Tensor:
        """`(out,)` as in PEFT's file: a column that is not adapted has the norm of its weight."""
        norms = torch.linalg.vector_norm(weight, dim=1)
        return norms.index_copy(0, self._columns(norms.device), self.lora_magnitude_vector.detach())

    def load_magnitudes(self, magnitudes: Tensor) -> None:
        """Loads the adapted columns of PEFT's `(out,)`."""
        self.lora_magnitude_vector.data.copy_(magnitudes[self._columns(magnitudes.device)])

    def _columns(self, device: torch.device) -> Tensor:
        return torch.cat([column_indices(piece, device) for piece in self.slices])

    def _scatter(self, values: Tensor, out_features: int) -> Tensor:
        """`(out,)` with `values` at the adapted columns and zero elsewhere."""
        return values.new_zeros(out_features).index_copy(0, self._columns(values.device), values)
