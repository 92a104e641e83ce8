"""Runs a base model on the tokens of a batch without its padding.

Half of the tokens in GLUE's padded batches of 16 are padding. After `enable_unpadding(model)`, you still call the model
with a padded batch and its attention mask. The rows are then concatenated before they enter the base model, attention
stays within each row, and the hidden states return to `(batch, length, hidden)` with zeros for padding. In a causal
model, prefixes that rows share are computed once (`kernels/prefixes.py`). Loss and gradients equal those of the padded
batch, up to rounding.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lora_hf.lora.active_adapter import STATE_ATTRIBUTE, BatchRouting, Segments
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.host_batch import NOTHING, ON_HOST, HostBatch, to_device
from lora_hf.lora.kernels.attention import Rows, attend_rows
from lora_hf.lora.kernels.prefixes import Trees, share_prefixes
from lora_hf.lora.last_layer import READS, announce_token_read, positions_read, prepare_last_layer, token_read

ATTENTION = "lora_hf_rows"
CACHE_ARGUMENTS = ("past_key_values", "cache")  # transformers 5.24 renamed it


def cache_argument(model: PreTrainedModel) -> str | None:
    """The name under which the model takes a cache of keys and values; None if it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def enable_unpadding(model: PreTrainedModel) -> str | None:
    """Makes the model run without padding. A second call has no effect.

    Returns:
        None on success; otherwise the reason why this model cannot run without padding. It is then unchanged.
    """
    reason = _unsupported(model)
    base: Any = model.base_model
    if reason is None and not is_unpadded(model):
        _register_attention()
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            return f"transformers cannot change the attention of {type(model).__name__}"
        base.register_forward_pre_hook(_before, with_kwargs=True)
        base.register_forward_hook(_after, with_kwargs=True)
        if token_read(model):
            announce_token_read(model)
    return reason


def is_unpadded(model: PreTrainedModel) -> bool:
    """Whether `enable_unpadding` has changed the model."""
    return _before in model.base_model._forward_pre_hooks.values()


def _unsupported(model: PreTrainedModel) -> str | None:
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        return f"model type {kind!r} has no entry in the role table"
    if ARCHITECTURES[kind].padded_because:
        return f"{kind} has {ARCHITECTURES[kind].padded_because}"
    if getattr(model.config, "output_router_logits", False):
        return "its loss reads the experts of a padded batch (output_router_logits)"
    if _slides(model.config):
        return f"{kind} has a sliding-window attention in this config"
    if model.config._attn_implementation not in ("sdpa", "eager", ATTENTION):
        return f"its attention is {model.config._attn_implementation!r}; expected sdpa or eager"
    if "position_ids" not in _parameters(type(model.base_model)):
        return f"{kind} takes no position_ids in this version of transformers"
    return None


def _slides(config: Any) -> bool:
    """Whether a token sees fewer than all tokens before it in any layer."""
    if not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", True) is False:
        return False
    return any("sliding" in kind for kind in getattr(config, "layer_types", None) or ["sliding_attention"])


@functools.cache
def _register_attention() -> None:
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass
class _Layout:
    """How the tokens of a padded batch are arranged for the base model.

    Attributes:
        shape: `(batch, length)` of the padded batch.
        tokens: the indices of all tokens in the flat padded batch.
        computed: the indices of the tokens that are computed. They are fewer than `tokens` if rows share prefixes; some
            at the end may be filling, which nothing reads.
        copies: for each of `tokens` the position of its result among `computed`; None if it is the same position.
        rows: the rows of `computed`.
        read: the positions among `computed` of all that the head reads; None if it may read everything.
    """

    shape: torch.Size
    tokens: Tensor
    computed: Tensor
    copies: Tensor | None
    rows: Rows
    read: Tensor | None = None

    def unpad(self, padded: Tensor) -> Tensor:
        """`(1, computed, ...)` from `(batch, length, ...)`."""
        return padded.flatten(0, 1).index_select(0, self.computed)[None]

    def pad(self, computed: Tensor) -> Tensor:
        """`(batch, length, ...)` from `(1, computed, ...)`, zeros where the padding is."""
        padded = computed.new_zeros(self.shape.numel(), *computed.shape[2:])
        states = computed[0, : len(self.tokens)] if self.copies is None else computed[0].index_select(0, self.copies)
        return padded.index_copy(0, self.tokens, states).unflatten(0, self.shape)


def _before(base: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    _register_attention()  # a model that another process pickled brings its hooks, but not the registration
    parameters = _parameters(type(base))
    named = dict(zip(parameters, inputs, strict=False)) | named
    token, routing = named.pop(READS, None), _routing(base)
    layout = _layout(base, named, routing, named.pop(ON_HOST, NOTHING), token)
    if routing is not None:
        routing.tokens = None if layout is None else _token_segments(routing, layout)
    if layout is None:
        return (), named
    named["position_ids"] = layout.unpad(_positions(base, named))
    for name in ("input_ids", "inputs_embeds", "token_type_ids"):
        if named.get(name) is not None:
            named[name] = layout.unpad(named[name])
    if "use_cache" in parameters:
        named["use_cache"] = False
    # transformers passes a mask of four dimensions on to the attention unchanged, which ignores it.
    named["attention_mask"] = named["attention_mask"].new_zeros(1, 1, 1, 1)
    return (), named | {"layout": layout}


def _after(base: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    layout: _Layout | None = named.get("layout")
    if layout is None:
        return output
    routing = _routing(base)
    if routing is not None:
        routing.tokens = None
    padded = layout.pad(output[0])
    if isinstance(output, tuple):
        return (padded, *output[1:])
    output.last_hidden_state = padded
    if getattr(output, "pooler_output", None) is not None:
        # ALBERT's pooler is only the projection.
        activate = getattr(base, "pooler_activation", None)
        output.pooler_output = activate(base.pooler(padded[:, 0])) if activate else base.pooler(padded)
    return output


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    """The names of the parameters of a model class's forward, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def _layout(
    base: PreTrainedModel,
    named: dict[str, Any],
    routing: BatchRouting | None = None,
    host: HostBatch = NOTHING,
    token: str | None = None,
) -> _Layout | None:
    """The layout of a batch; None without a mask, in generation, and if attentions or all hidden states are wanted.

    It is made on the host and copied to the device: every size in it is needed there.
    """
    mask = named.get("attention_mask")
    special = ("encoder_hidden_states", "output_attentions", "output_hidden_states", "use_cache", *CACHE_ARGUMENTS)
    asked = [named.get(name) for name in special]  # an empty cache is false, but it wants the keys and values
    if mask is None or mask.ndim != 2 or any(each is not None and each is not False for each in asked):
        return None
    device, mask = mask.device, host.get("attention_mask", mask)
    lengths = mask.sum(1).tolist()
    if min(lengths) == 0:
        return None
    tokens = mask.flatten().nonzero()[:, 0]
    computed, copies, sees = tokens, None, None
    if routing is not None:
        lengths, computed, copies = _sort_by_adapter(routing, tokens, lengths)
    elif (trees := _trees(base, named, mask, tokens, lengths, host)) is not None:
        lengths, sees = trees.lengths, [*trees.sees]
        computed, copies = tokens[trees.first], trees.copies
    read = None
    if token is not None and routing is None:
        ids = host.get("input_ids", named["input_ids"]) if token == "last" and "input_ids" in named else None
        read = _read_only(positions_read(base, token, mask, ids), tokens, copies, base)
    filling = _filling(sum(lengths), base.dtype) if device.type == "cpu" else 0
    if filling:
        lengths, computed = [*lengths, filling], torch.cat([computed, computed[:1].expand(filling)])
        sees = None if sees is None else [*sees, None]
    moved = to_device(tokens, device)
    return _Layout(
        mask.shape,
        moved,
        moved if computed is tokens else to_device(computed, device),
        None if copies is None else to_device(copies, device),
        Rows(lengths, device, sees),
        None if read is None else to_device(read, device),
    )


def _read_only(positions: Tensor | None, tokens: Tensor, copies: Tensor | None, base: PreTrainedModel) -> Tensor | None:
    """The positions among the computed tokens of all that the head reads; None to compute all."""
    if positions is None or len(positions) >= len(tokens) or not prepare_last_layer(base):
        return None
    place = torch.searchsorted(tokens, positions)
    return (place if copies is None else copies[place]).unique()


def _routing(base: PreTrainedModel) -> BatchRouting | None:
    state = getattr(base, STATE_ATTRIBUTE, None)
    return None if state is None else state.routing


def _sort_by_adapter(
    routing: BatchRouting, tokens: Tensor, lengths: list[int]
) -> tuple[list[int], Tensor, Tensor | None]:
    """Lengths, `computed` and `copies` of a layout whose rows are sorted by adapter."""
    order = routing.segments(len(lengths)).order
    if order is None:
        return lengths, tokens, None
    positions = torch.arange(len(tokens), device=tokens.device)
    rows = positions.split(lengths)
    chosen = torch.cat([rows[row] for row in order.tolist()])
    return (
        [lengths[row] for row in order.tolist()],
        tokens[chosen],
        torch.empty_like(chosen).scatter_(0, chosen, positions),
    )


def _token_segments(routing: BatchRouting, layout: _Layout) -> Segments:
    """The segments of the tokens of sorted rows; the filling belongs to the bare base."""
    ends, edges = routing.segments(layout.shape[0]).ends, [0, *accumulate(layout.rows.lengths)]
    return Segments(edges[-1], None, tuple(edges[end] for end in ends))


def _trees(
    base: PreTrainedModel, named: dict[str, Any], mask: Tensor, tokens: Tensor, lengths: list[int], host: HostBatch
) -> Trees | None:
    """The trees of a causal model's rows, if nothing but its id and its position in the row tells a token apart."""
    other = ("inputs_embeds", "token_type_ids", "position_ids")
    if not ARCHITECTURES[base.config.model_type].causal or any(named.get(name) is not None for name in other):
        return None
    if bool((mask.diff(dim=1) > 0).any()):
        return None  # padded in front, or inside a row, where equal prefixes have different positions
    ids = host.get("input_ids", named["input_ids"]).flatten()[tokens].split(lengths)
    return share_prefixes([row.tolist() for row in ids], base.config.hidden_size)


def _filling(tokens: int, dtype: torch.dtype) -> int:
    """How many tokens to add so that their numbers repeat, with 16 to 64 in each doubling.

    For each new number oneDNN compiles kernels. Those of half precision take about a millisecond and hundreds of
    kilobytes each, and a thousand of them fill its cache.
    """
    if dtype == torch.float32:
        return -tokens % max(8, 2 ** (tokens.bit_length() - 6))
    return -tokens % max(32, 2 ** (tokens.bit_length() - 5))


def _positions(base: PreTrainedModel, named: dict[str, Any]) -> Tensor:
    """`(batch, length)`: the positions that the model itself would count in a row without padding in front."""
    mask, given = named["attention_mask"].long(), named.get("position_ids")
    if given is not None:
        return given.expand(mask.shape)
    if ARCHITECTURES[base.config.model_type].counts_from_padding:
        # RoBERTa counts the tokens other than the padding token, which a text may contain too, from the id after it.
        embeddings: Any = base.embeddings
        padding, ids = embeddings.padding_idx, named.get("input_ids")
        counted = mask if ids is None else mask * (ids != padding)
        return counted.cumsum(1) * counted + padding
    length = torch.arange(mask.shape[1], device=mask.device)
    return (length - mask.argmax(1, keepdim=True)).clamp(min=0)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: _Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q, k, v `(1, heads, tokens, head_dim)` to `(1, tokens, heads, head_dim)`."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )  # type: ignore[return-value]
    causal = bool(getattr(module, "is_causal", False))
    return attend_rows(query[0], key[0], value[0], layout.rows, scaling, causal, dropout)[None], None
