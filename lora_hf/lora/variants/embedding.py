"""LoRA on an embedding, `y = W[x] + scaling * B A[x]`, as in loralib and PEFT (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_hf.core.errors import AdapterError
from lora_hf.lora.heads import input_embeddings
from lora_hf.lora.layers import LoraLinear, LoraWeights

logger = logging.getLogger(__name__)


class EmbeddingWeights(LoraWeights):
    """A `(r, vocabulary)`, zero at the start, and B `(dim, r)`, drawn from a standard normal distribution.

    Each token's column of A is looked up; that of the padding token gets no gradient. There is no dropout, as in PEFT.
    """

    def __init__(self, *plain: Any) -> None:
        super().__init__(*plain)
        self.lora_dropout = 0.0
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def adapt(self, base_layer: nn.Module, x: Tensor) -> Tensor:
        y = base_layer(x)
        columns = nn.functional.embedding(x, self.lora_A.T, base_layer.padding_idx)  # type: ignore[arg-type]
        return y + (columns @ self.lora_B.T * self.scaling).to(y.dtype)

    def moved(self) -> bool:
        return bool(self.lora_A.any())


def embeddings_path(model: PreTrainedModel) -> str:
    """The path of the model's token embeddings."""
    tokens = input_embeddings(model)
    return next((path for path, module in model.named_modules() if module is tokens), "")


def is_base(layers: Mapping[str, nn.Module], key: str, tensor: Tensor) -> bool:
    """Whether a tensor of a file equals an embedding or the output head of the base, which PEFT writes too."""
    layer: Any = layers.get(key.removesuffix(".weight").removesuffix(".base_layer").removesuffix(".token_adapter"))
    if layer is None or ".lora_" in key or not key.endswith(".weight") or layer.weight.shape != tensor.shape:
        return False
    return torch.equal(layer.weight, tensor.to(layer.weight))


def warn_if_tied(model: PreTrainedModel, paths: Iterable[str]) -> None:
    """Logs the modules to adapt whose weight the input embeddings and the output head share."""
    shared = _shared_weight(model)
    for path in paths:
        if shared is not None and getattr(model.get_submodule(path), "weight", None) is shared:
            logger.warning(
                "%s: the input embeddings and the output head share its weight. The adapter changes one of the two, so "
                "it cannot be merged",
                path,
            )


def check_not_tied(model: PreTrainedModel) -> None:
    """Raises AdapterError if a merge would change a weight that the embeddings and the output head share."""
    shared = _shared_weight(model)
    for path, layer in model.named_modules() if shared is not None else ():
        if isinstance(layer, LoraLinear) and layer.active and layer.weight is shared:
            raise AdapterError(
                f"{path}: the input embeddings and the output head share its weight, and merging adapter "
                f"{layer.active!r} would change both. Use the adapter without merging it"
            )


def _shared_weight(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    return head.weight if head is not None and head.weight is getattr(input_embeddings(model), "weight", None) else None
