"""Computes projections of the same input together, such as q, k and v of a layer.

The first one to be called computes the outputs of all, and the others return theirs (`kernels.fused`). Names decide
which projections belong together. Each call checks that the input is the same tensor, so a model that passes different
inputs gets the same results, only more slowly.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.inject import lora_layers
from lora_hf.lora.kernels.fused import Projection, lora_linears
from lora_hf.lora.layers import LoraLinear
from lora_hf.lora.role_guesses import guess_roles

_READERS = {role: readers for readers in (("q", "k", "v"), ("ffn_gate", "ffn_up")) for role in readers}


def share_inputs(model: PreTrainedModel) -> int:
    """Makes LoRA layers with the same input run together in training. A second call has no effect.

    Returns:
        The number of groups; 0 for a model type whose layers call their projections with several inputs.
    """
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or architecture.several_inputs:
        return 0
    groups = defaultdict[Any, list[LoraLinear]](list)
    layers = lora_layers(model)
    for path, role in guess_roles({path: layer.base_layer for path, layer in layers.items()}, None).items():
        if role in _READERS and "cross" not in path:
            groups[path.rpartition(".")[0], _READERS[role]].append(layers[path])
    shared = [SharedInput(tuple(group)) for group in groups.values() if len(group) > 1]
    for each in shared:
        for layer in each.layers:
            layer.shared_input = each
    return len(shared)


@dataclass
class _Pending:
    """Outputs that are computed and not yet asked for; `version` counts the changes of x in place."""

    x: Tensor
    version: int
    name: str
    outputs: dict[LoraLinear, Tensor]


class SharedInput:
    """The LoRA layers that read one input."""

    def __init__(self, layers: tuple[LoraLinear, ...]) -> None:
        self.layers = layers
        self._pending: _Pending | None = None

    def output(self, layer: LoraLinear, x: Tensor, name: str) -> Tensor | None:
        """The output of one of the layers with adapter `name`; None if it has to be computed alone."""
        if torch.compiler.is_compiling():
            return None  # what is pending would be compiled in
        pending = self._pending
        if pending is not None and pending.x is x and pending.version == x._version and pending.name == name:
            y = pending.outputs.pop(layer, None)
            if not pending.outputs:
                self._pending = None
            if y is not None:
                return y
        projections = {each: projection for each in self.layers if (projection := _projection(each, x, name))}
        if layer not in projections or len(projections) < 2:
            return None
        outputs = dict(zip(projections, lora_linears(x, list(projections.values())), strict=True))
        y = outputs.pop(layer)
        self._pending = _Pending(x, x._version, name, outputs)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_pending": None}  # no copy and no pickle carries a batch along


def _projection(layer: LoraLinear, x: Tensor, name: str) -> Projection | None:
    """What `lora_linears` computes; None if the layer does more, less or something else."""
    if name not in layer.adapters or layer.merged_layer is not None:
        return None
    weights = layer.adapters[name]
    if not weights.plain or (weights.training and weights.lora_dropout):  # each has a mask of its own
        return None
    return weights.projection(layer.base_layer, x)
