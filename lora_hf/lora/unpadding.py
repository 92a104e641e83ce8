"""Runs a base model on the tokens of a batch alone, and hands hidden states back in their usual shape.

At batch 16 half of what GLUE's padded batches hold is padding. After `remove_padding(model)` the model is called as
ever, with a padded batch and its attention mask. In front of the base model the rows are laid one after the
other, its attention keeps to each row, and behind it the hidden states are put back to `(batch, length, hidden)`, zeros
where the padding was. What rows of a causal model begin with alike is computed once (`kernels/prefixes.py`). Loss and
gradients are those of the padded batch, to rounding.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lora_hf.lora.active_adapter import STATE_ATTRIBUTE, BatchRouting, Segments
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.kernels.attention import Rows, attend_rows
from lora_hf.lora.kernels.prefixes import Trees, share_prefixes

ATTENTION = "lora_hf_rows"


def enable_unpadding(model: PreTrainedModel) -> str | None:
    """Makes the model run without padding; doing it again changes nothing.

    Returns:
        None, or why this model cannot run without padding. It is unchanged then.
    """
    reason = _unsupported(model)
    base: Any = model.base_model
    if reason is None and _before not in base._forward_pre_hooks.values():
        _register_attention()
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            return f"transformers cannot change the attention of {type(model).__name__}"
        base.register_forward_pre_hook(_before, with_kwargs=True)
        base.register_forward_hook(_after, with_kwargs=True)
    return reason


def _unsupported(model: PreTrainedModel) -> str | None:
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        return f"model type {kind!r} has no entry in the role table"
    if not ARCHITECTURES[kind].plain_attention:
        return f"{kind} has an attention of its own"
    if model.config._attn_implementation not in ("sdpa", "eager", ATTENTION):
        return f"its attention is {model.config._attn_implementation!r}; expected sdpa or eager"
    if "position_ids" not in _parameters(type(model.base_model)):
        return f"{kind} takes no position_ids in this version of transformers"
    return None


@functools.cache
def _register_attention() -> None:
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass
class _Layout:
    """The shape `(batch, length)` of a padded batch, the flat places of its tokens, and the rows that are computed.

    `taken` are the places of the tokens that are computed, fewer than `places` where rows share a beginning, and at the
    end some that nothing reads; `copies` has for each of `places` the number of its token among them, None: its own.
    """

    shape: torch.Size
    places: torch.Tensor
    taken: torch.Tensor
    copies: torch.Tensor | None
    rows: Rows

    def take(self, padded: torch.Tensor) -> torch.Tensor:
        """`(1, tokens, ...)` from `(batch, length, ...)`."""
        return padded.flatten(0, 1).index_select(0, self.taken)[None]

    def put_back(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, length, ...)` from `(1, tokens, ...)`, zeros where the padding is."""
        padded = tokens.new_zeros(self.shape.numel(), *tokens.shape[2:])
        found = tokens[0, : len(self.places)] if self.copies is None else tokens[0].index_select(0, self.copies)
        return padded.index_copy(0, self.places, found).unflatten(0, self.shape)


def _before(base: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    _register_attention()  # a model that another process pickled brings its hooks, but not the registration
    parameters = _parameters(type(base))
    named = dict(zip(parameters, inputs, strict=False)) | named
    mixture = _mixture(base)
    layout = _layout(base, named, mixture)
    if mixture is not None:
        mixture.tokens = None if layout is None else _token_segments(mixture, layout)
    if layout is None:
        return (), named
    named["position_ids"] = layout.take(_positions(base, named))
    for name in ("input_ids", "inputs_embeds", "token_type_ids"):
        if named.get(name) is not None:
            named[name] = layout.take(named[name])
    if "use_cache" in parameters:
        named["use_cache"] = False
    # A mask of four dimensions is handed to the attention as it is, which does not look at it.
    named["attention_mask"] = named["attention_mask"].new_zeros(1, 1, 1, 1)
    return (), named | {"layout": layout}


def _after(base: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    layout: _Layout | None = named.get("layout")
    if layout is None:
        return output
    mixture = _mixture(base)
    if mixture is not None:
        mixture.tokens = None
    padded = layout.put_back(output[0])
    if isinstance(output, tuple):
        return (padded, *output[1:])
    output.last_hidden_state = padded
    if getattr(output, "pooler_output", None) is not None:
        output.pooler_output = base.pooler(padded)
    return output


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    """Of the forward of a class of models, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def _layout(base: PreTrainedModel, named: dict[str, Any], mixture: BatchRouting | None = None) -> _Layout | None:
    """The layout of a batch; None without a mask, in generation, and where attentions or all states are asked for."""
    mask = named.get("attention_mask")
    special = ("past_key_values", "encoder_hidden_states", "output_attentions", "output_hidden_states")
    if mask is None or mask.ndim != 2 or any(named.get(name) for name in (*special, "use_cache")):
        return None
    lengths = mask.sum(1).tolist()
    if min(lengths) == 0:
        return None
    places = mask.flatten().nonzero()[:, 0]
    taken, copies, sees = places, None, None
    trees = _trees(base, named, places, lengths) if mixture is None else None
    if mixture is not None:
        lengths, taken, copies = _by_adapter(mixture, places, lengths)
    if trees is not None:
        lengths, sees = trees.lengths, [*trees.sees]
        taken, copies = places[trees.first.to(mask.device)], trees.copies.to(mask.device)
    filling = _filling(sum(lengths)) if mask.device.type == "cpu" else 0
    if filling:
        lengths, taken = [*lengths, filling], torch.cat([taken, taken[:1].expand(filling)])
        sees = None if sees is None else [*sees, None]
    return _Layout(mask.shape, places, taken, copies, Rows(lengths, mask.device, sees))


def _mixture(base: PreTrainedModel) -> BatchRouting | None:
    switch = getattr(base, STATE_ATTRIBUTE, None)
    return None if switch is None else switch.routing


def _by_adapter(
    mixture: BatchRouting, places: torch.Tensor, lengths: list[int]
) -> tuple[list[int], torch.Tensor, torch.Tensor | None]:
    """Rows in the order of their adapters: their lengths, the places of their tokens, and where each token went."""
    order = mixture.segments(len(lengths)).order
    if order is None:
        return lengths, places, None
    rows = torch.arange(len(places), device=places.device).split(lengths)
    chosen = torch.cat([rows[row] for row in order.tolist()])
    copies = torch.empty_like(chosen)
    copies[chosen] = torch.arange(len(chosen), device=chosen.device)
    return [lengths[row] for row in order.tolist()], places[chosen], copies


def _token_segments(mixture: BatchRouting, layout: _Layout) -> Segments:
    """The segments of the tokens of rows that stand in the order of their adapters; what fills up is the base's."""
    ends, edges = mixture.segments(layout.shape[0]).ends, [0, *accumulate(layout.rows.lengths)]
    return Segments(edges[-1], None, tuple(edges[end] for end in ends))


def _trees(base: PreTrainedModel, named: dict[str, Any], places: torch.Tensor, lengths: list[int]) -> Trees | None:
    """The trees of a causal model's rows, where a token's id and place in its row are all that it depends on."""
    other = ("inputs_embeds", "token_type_ids", "position_ids")
    if not ARCHITECTURES[base.config.model_type].causal or any(named.get(name) is not None for name in other):
        return None
    if bool((named["attention_mask"].diff(dim=1) > 0).any()):
        return None  # padded on the left or within: rows that begin alike stand at different positions
    ids = named["input_ids"].flatten()[places].split(lengths)
    return share_prefixes([row.tolist() for row in ids], base.config.hidden_size)


def _filling(tokens: int) -> int:
    """How many tokens to add: on the CPU every new number of tokens makes oneDNN build and keep its kernels anew.

    Filled up to the next of 32 to 64 sizes in each doubling, sizes come again.
    """
    return -tokens % max(8, 2 ** (tokens.bit_length() - 6))


def _positions(base: PreTrainedModel, named: dict[str, Any]) -> torch.Tensor:
    """`(batch, length)`: each token's position in the padded batch, as the model itself would count it."""
    mask, given = named["attention_mask"], named.get("position_ids")
    if given is not None:
        return given.expand(mask.shape)
    if base.config.model_type == "roberta":
        # RoBERTa counts from the padding token's number on, and counts tokens that are not padding.
        return mask.long().cumsum(1) + base.config.pad_token_id
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: _Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q, k, v `(1, heads, tokens, head_dim)` to `(1, tokens, heads, head_dim)`."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )  # type: ignore[return-value]
    causal = bool(getattr(module, "is_causal", False))
    return attend_rows(query[0], key[0], value[0], layout.rows, scaling, causal, dropout)[None], None
