"""Where each model type keeps its projections: one table, so that a new model is a new entry.

Paths are anchored at the base model (`model.base_model`, the part that `roberta.` or `transformer.` prefixes in a model
with a head); `*` stands for the layer number. GPT-2 fuses q, k and v into one projection, whose output columns hold
them one after the other: `slice=(index, count)` names the share of a role.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """One role's module, and which of `count` equal shares of its output the role is."""

    path: str
    slice: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Architecture:
    """The projections of a model type by role, and the top-level modules that make its classification head.

    A head module is one that pretraining does not provide: it starts random, is always trained and always saved.
    `plain_attention` is False where the attention is more than softmax of q times k, times v; `causal` is True where a
    token sees only what stands before it.
    """

    projections: dict[str, Projection]
    head: tuple[str, ...]
    plain_attention: bool = True
    causal: bool = False


def _bert_like(layer: str) -> dict[str, Projection]:
    return {
        "q": Projection(f"{layer}.attention.self.query"),
        "k": Projection(f"{layer}.attention.self.key"),
        "v": Projection(f"{layer}.attention.self.value"),
        "o": Projection(f"{layer}.attention.output.dense"),
        "ffn_up": Projection(f"{layer}.intermediate.dense"),
        "ffn_down": Projection(f"{layer}.output.dense"),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        projections={
            "q": Projection("h.*.attn.c_attn", slice=(0, 3)),
            "k": Projection("h.*.attn.c_attn", slice=(1, 3)),
            "v": Projection("h.*.attn.c_attn", slice=(2, 3)),
            "o": Projection("h.*.attn.c_proj"),
            "ffn_up": Projection("h.*.mlp.c_fc"),
            "ffn_down": Projection("h.*.mlp.c_proj"),
        },
        head=("score",),
        causal=True,
    ),
    "roberta": Architecture(projections=_bert_like("encoder.layer.*"), head=("classifier",)),
    "bert": Architecture(projections=_bert_like("encoder.layer.*"), head=("classifier",)),
    "distilbert": Architecture(
        projections={
            "q": Projection("transformer.layer.*.attention.q_lin"),
            "k": Projection("transformer.layer.*.attention.k_lin"),
            "v": Projection("transformer.layer.*.attention.v_lin"),
            "o": Projection("transformer.layer.*.attention.out_lin"),
            "ffn_up": Projection("transformer.layer.*.ffn.lin1"),
            "ffn_down": Projection("transformer.layer.*.ffn.lin2"),
        },
        head=("pre_classifier", "classifier"),
    ),
    "deberta-v2": Architecture(
        projections={
            **_bert_like("encoder.layer.*"),
            "q": Projection("encoder.layer.*.attention.self.query_proj"),
            "k": Projection("encoder.layer.*.attention.self.key_proj"),
            "v": Projection("encoder.layer.*.attention.self.value_proj"),
        },
        head=("pooler", "classifier"),
        plain_attention=False,
    ),
    "llama": Architecture(
        projections={
            "q": Projection("layers.*.self_attn.q_proj"),
            "k": Projection("layers.*.self_attn.k_proj"),
            "v": Projection("layers.*.self_attn.v_proj"),
            "o": Projection("layers.*.self_attn.o_proj"),
            "ffn_gate": Projection("layers.*.mlp.gate_proj"),
            "ffn_up": Projection("layers.*.mlp.up_proj"),
            "ffn_down": Projection("layers.*.mlp.down_proj"),
        },
        head=("score",),
        causal=True,
    ),
}
