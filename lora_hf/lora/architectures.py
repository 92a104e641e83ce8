"""The role table: where each model type keeps its projections. A new model type is a new entry.

Paths start at the base model (`model.base_model`, what `roberta.` or `transformer.` prefixes in a model with a head);
`*` stands for the layer number. GPT-2 fuses q, k and v into one projection whose output columns hold them one after the
other: `slice=(index, count)` names the share of a role.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """The module of one role, and which of `count` equal shares of its output belongs to the role."""

    path: str
    slice: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Architecture:
    """The projections of a model type by role.

    Attributes:
        head: the top-level modules of its classification head. Pretraining does not provide them: they start random and
            are always trained and saved.
        plain_attention: whether its attention is `softmax(q k^T) v` and nothing else.
        causal: whether a token sees only those before it.
    """

    projections: dict[str, Projection]
    head: tuple[str, ...]
    plain_attention: bool = True
    causal: bool = False


def _in_layer(layer: str, **paths: str) -> dict[str, Projection]:
    return {role: Projection(f"{layer}.{path}") for role, path in paths.items()}


_BERT = _in_layer(
    "encoder.layer.*",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    ffn_up="intermediate.dense",
    ffn_down="output.dense",
)
_DEBERTA = _BERT | {role: Projection(f"{_BERT[role].path}_proj") for role in "qkv"}
_DISTILBERT = _in_layer(
    "transformer.layer.*",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    ffn_up="ffn.lin1",
    ffn_down="ffn.lin2",
)
_GPT2 = {role: Projection("h.*.attn.c_attn", slice=(index, 3)) for index, role in enumerate("qkv")} | _in_layer(
    "h.*", o="attn.c_proj", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"
)
_LLAMA = _in_layer(
    "layers.*",
    **{role: f"self_attn.{role}_proj" for role in "qkvo"},
    **{f"ffn_{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")},
)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(_GPT2, head=("score",), causal=True),
    "roberta": Architecture(_BERT, head=("classifier",)),
    "bert": Architecture(_BERT, head=("classifier",)),
    "distilbert": Architecture(_DISTILBERT, head=("pre_classifier", "classifier")),
    "deberta-v2": Architecture(_DEBERTA, head=("pooler", "classifier"), plain_attention=False),
    "llama": Architecture(_LLAMA, head=("score",), causal=True),
}
