"""Runs the last layer of a classifier, after its attention, only for the token of each row that the head reads.

BERT and its relatives classify by the first token, causal models by the last. The last layer's other hidden states are
never read, so their output projection, their feed-forward network and the backward pass of both are skipped. Attention
still sees the queries, keys and values of every token. This works on rows without padding (`unpadding.py`).

The layer is called with the tokens that are read. Its first module, a norm or the attention, gets all tokens. From the
attention's output projection on, only the tokens that are read remain. The layer returns zeros for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.heads import plain_module

READS = "lora_hf_reads"  # the argument by which a classifier tells its base which token its head reads


@dataclass
class _Running:
    """A last layer that is running: all hidden states until its first module takes them, and the tokens to keep."""

    hidden: Tensor | None
    kept: Tensor
    tokens: int


_running: ContextVar[_Running | None] = ContextVar("running", default=None)


def token_read(model: PreTrainedModel) -> str | None:
    """`first` or `last`, if the head of this transformers classifier reads that token alone; None otherwise."""
    kind, base, architecture = type(model), model.base_model, ARCHITECTURES.get(model.config.model_type)
    if not (kind.__name__.endswith("ForSequenceClassification") and kind.__module__.startswith("transformers.models.")):
        return None
    if architecture is None or architecture.padded_because or _last_layer(base) is None:
        return None
    if architecture.causal:
        return "last" if isinstance(plain_module(model, "score"), nn.Linear) else None
    if model.config.model_type == "distilbert":
        return "first"
    reader = "classifier" if getattr(base, "pooler", None) is None else f"{model.base_model_prefix}.pooler"
    reader_kind = type(plain_module(model, reader))
    is_theirs = reader_kind.__module__.startswith("transformers.models.")
    return "first" if is_theirs and reader_kind.__name__.endswith(("ClassificationHead", "Pooler")) else None


def announce_token_read(model: PreTrainedModel) -> None:
    """Tells the base which token the head reads, each time the whole model runs."""
    if _announce not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_announce, with_kwargs=True)


def _announce(model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    token = token_read(model)
    return inputs, named if token is None else named | {READS: token}


def positions_read(base: PreTrainedModel, token: str, mask: Tensor, ids: Tensor | None) -> Tensor | None:
    """The position in the flat padded batch that the head reads of each row; None if one of them is padding.

    Args:
        mask: `(batch, length)`, on the host.
        ids: of the same shape and on the host; None if the model gets embeddings.
    """
    rows, length = mask.shape
    positions = torch.zeros(rows, dtype=torch.long)
    if token == "last":
        padding = base.config.get_text_config().pad_token_id
        if ids is None or padding is None:
            positions += length - 1
        else:  # the rightmost token with another id than that of padding, as transformers finds it
            positions = (torch.arange(length) * (ids != padding)).argmax(-1)
    positions = positions + torch.arange(rows) * length
    return positions if bool(mask.flatten()[positions].all()) else None


def prepare_last_layer(base: PreTrainedModel) -> bool:
    """Whether the base can keep few tokens in its last layer: nobody else has put a hook where it would see them."""
    layer, attention, output = _last_layer(base)  # type: ignore[misc]
    children = [child for child in layer.children() if all(module is not attention for module in child.modules())]
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = [(layer, _keep_few), *((child, _enter) for child in children)]
    for module, hook in [*hooks, (attention, _enter), (output, _keep_in_output)]:
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook, with_kwargs=True)
    if _leave not in layer._forward_hooks.values():
        layer.register_forward_hook(_leave, always_call=True)
    return not any(_foreign_hooks(module) for module in _watched(base, layer))


def _watched(base: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The modules that get or return hidden states of the last layer or of what follows it."""
    others = [module for child in base.children() for module in (child, *child.children())]
    return [base, *others, *layer.modules()]


def _foreign_hooks(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not getattr(hook, "__module__", "").startswith("lora_hf.lora.") for hook in hooks)


def _last_layer(base: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """The last layer, its attention and the output projection of that; None if layers share their weights."""
    config: Any = base.config
    roles = ARCHITECTURES[config.model_type].projections
    last = str(config.num_hidden_layers - 1)
    output, query = (roles[role].path.replace("*", last) for role in ("o", "q"))
    try:
        layer = base.get_submodule(output[: output.index(f".{last}.") + len(last) + 1])
        return layer, base.get_submodule(query.rpartition(".")[0]), base.get_submodule(output)
    except AttributeError:
        return None


def _keep_few(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    layout = named.get("layout")
    if layout is None or layout.read is None:
        return None
    hidden = inputs[0] if inputs else named["hidden_states"]
    _running.set(_Running(hidden, layout.read, hidden.shape[1]))
    return _with_hidden(inputs, named, hidden.index_select(1, layout.read))


def _enter(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The first module of the layer gets all tokens; a later one beside the attention gets few."""
    running = _running.get()
    if running is None:
        return None
    if running.hidden is not None:
        hidden, running.hidden = running.hidden, None
        return _with_hidden(inputs, named, hidden)
    # Between its norm and the network beside it, an attention gets all tokens of the norm.
    return None if "layout" in named else _keep_in_output(module, inputs, named)


def _keep_in_output(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    running, hidden = _running.get(), inputs[0] if inputs else None
    if running is None or hidden is None or hidden.ndim != 3 or hidden.shape[1] != running.tokens:
        return None
    return _with_hidden(inputs, named, hidden.index_select(1, running.kept))


def _with_hidden(inputs: tuple[Any, ...], named: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    return ((hidden, *inputs[1:]), named) if inputs else ((), named | {"hidden_states": hidden})


def _leave(layer: Any, inputs: Any, output: Any) -> Any:
    running = _running.get()
    if running is None or output is None:  # None after an error
        _running.set(None)
        return None
    _running.set(None)
    few = output[0] if isinstance(output, tuple) else output
    hidden = few.new_zeros(len(few), running.tokens, few.shape[-1]).index_copy(1, running.kept, few)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
