"""Trained rows of the token embeddings: PEFT's `trainable_token_indices`, for a few new or special tokens.

The embedding of a listed token is the adapter's own row instead of the base's. Where the output head shares the
embeddings' weight, the logits of these tokens are those of the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import AdapterState
from lora_hf.lora.adapter_dict import modules_of_base
from lora_hf.lora.layers import AdaptedModule

FILE_KEY = "token_adapter.trainable_tokens_delta"  # relative to the embedding; PEFT's name, although it holds rows
BASE_KEY = "token_adapter.base_layer.weight"  # the embedding beneath them, where PEFT saves it as well


class TokenRows(nn.Module):
    """The fp32 rows `(n, hidden)` of one adapter for the tokens `ids`; they start as the base's."""

    ids: Tensor

    def __init__(self, ids: Sequence[int], weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=weight.device))
        self.rows = nn.Parameter(weight.detach()[self.ids].float().clone())


class TokenAdaptedModule(AdaptedModule):
    """The token embeddings, or the output head that shares their weight, with the rows of each adapter."""

    def forward(self, x: Tensor) -> Tensor:
        y, routing = self.base_layer(x), self.adapter_state.routing
        if routing is not None:
            return routing.apply(y, x, self._replace, self.adapters)
        return y if self.active is None else self._replace(self.active, x, y)

    def _replace(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        own: TokenRows = self.adapters[name]
        if isinstance(self.base_layer, nn.Embedding):
            matches = x[..., None] == own.ids  # (..., n)
            rows = own.rows[matches.int().argmax(-1)].to(y.dtype) * getattr(self.base_layer, "embed_scale", 1)
            return torch.where(matches.any(-1, keepdim=True), rows, y)
        logits = nn.functional.linear(x, own.rows.to(x.dtype), None if self.bias is None else self.bias[own.ids])
        return y.index_copy(-1, own.ids, logits.to(y.dtype))


def add_token_rows(model: PreTrainedModel, ids: Mapping[str, Sequence[int]], name: str, state: AdapterState) -> None:
    """Gives adapter `name` rows of its own for the token ids at each embedding path, and at a head that is tied to it.

    Raises:
        AdapterError: a token that the embeddings do not have, or another adapter in the embeddings.
    """
    for path, tokens in ids.items():
        embedding: Any = model.get_submodule(path)
        head = model.get_output_embeddings()
        if not isinstance(embedding, TokenAdaptedModule) and not isinstance(embedding, nn.Embedding):
            raise AdapterError(f"{path}: another adapter has changed these embeddings; use separate models")
        if max(tokens, default=0) >= len(embedding.weight):
            raise AdapterError(
                f"{path}: the adapter has a row for token {max(tokens)}; the base has {len(embedding.weight)} tokens. "
                "Call resize_token_embeddings first"
            )
        rows = TokenRows(tokens, embedding.weight)
        paths = [path]
        if head is not None and head.weight is embedding.weight:
            paths.append(next(each for each, module in model.named_modules() if module is head))
        for each in paths:
            module = model.get_submodule(each)
            if not isinstance(module, TokenAdaptedModule):
                model.set_submodule(each, module := TokenAdaptedModule(module, state))
            module.adapters[name] = rows


def token_rows(model: nn.Module, name: str) -> dict[str, TokenRows]:
    """The rows of adapter `name`, by the path of the embedding."""
    return {
        path: module.adapters[name]
        for path, module in token_modules(model).items()
        if name in module.adapters and isinstance(module.base_layer, nn.Embedding)
    }


def token_modules(model: nn.Module) -> dict[str, TokenAdaptedModule]:
    """Every embedding and head with trained rows, by its path."""
    return {path: module for path, module in modules_of_base(model) if isinstance(module, TokenAdaptedModule)}
