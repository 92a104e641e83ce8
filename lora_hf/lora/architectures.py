"""The role table: where each model type keeps its projections. A new model type is a new entry.

Paths start at the base model (`model.base_model`, what `roberta.` or `transformer.` prefixes in a model with a head);
`*` stands for one segment, such as the layer number, and `|` separates alternatives. Some types fuse several roles into
one projection: `columns` says which columns of its output belong to a role.

A type that is not here works too (`role_guesses`); the table gives its roles, and the fast paths that a test holds to
transformers' own results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lora_hf.lora.slices import Slice

Columns = Callable[["PretrainedConfig", int], "Slice"]  # from the config and the width of the fused projection


@dataclass(frozen=True)
class Projection:
    """The module of one role, and its columns of the output; None for all of them."""

    path: str
    columns: Columns | None = None


@dataclass(frozen=True)
class Architecture:
    """The projections of a model type by role.

    Attributes:
        padded_because: what its attention does besides `softmax(q k^T) v` within each row, so that batches keep their
            padding; empty where they run without.
        causal: whether a token sees only those before it.
        plain_logits: whether its language model is `base(x) W^T` and nothing else.
        counts_from_padding: whether positions start after the id of the padding token, as in RoBERTa.
        refused: roles that this type has but that cannot be adapted, with the reason.
        several_inputs: whether a layer calls its q, k and v with different inputs, or some of them twice.
    """

    projections: Mapping[str, Projection]
    padded_because: str = ""
    causal: bool = False
    plain_logits: bool = False
    counts_from_padding: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    several_inputs: bool = False


def _in_layer(layer: str, **paths: str) -> dict[str, Projection]:
    return {role: Projection("|".join(f"{layer}.{each}" for each in path.split("|"))) for role, path in paths.items()}


def _fused(path: str, *roles: str, columns: Callable[[int], Columns] | None = None) -> dict[str, Projection]:
    """Roles that share a projection: equal shares one after the other, or what `columns` gives for their number."""
    count = len(roles)
    return {
        role: Projection(path, columns(index) if columns else _share(index, count)) for index, role in enumerate(roles)
    }


def _share(index: int, count: int) -> Columns:
    return lambda config, width: (width // count * index, width // count * (index + 1))


def _by_head(index: int) -> Columns:
    """q, k and v of the first head, then of the second, and so on (GPT-NeoX, BLOOM, DeBERTa)."""

    def columns(config: Any, width: int) -> Slice:
        step = width // config.num_attention_heads
        return index * step // 3, width, step // 3, step

    return columns


def _grouped_query(index: int) -> Columns:
    """All heads of q, then those of k, then those of v, which are fewer (Phi-3)."""

    def columns(config: Any, width: int) -> Slice:
        size = width // (config.num_attention_heads + 2 * config.num_key_value_heads)
        q, kv = size * config.num_attention_heads, size * config.num_key_value_heads
        return ((0, q), (q, q + kv), (q + kv, width))[index]

    return columns


def _falcon(index: int) -> Columns:
    """Falcon's three layouts, as `FalconAttention._split_heads` reads them."""

    def columns(config: Any, width: int) -> Slice:
        heads = config.num_attention_heads
        size = config.hidden_size // heads
        if not config.new_decoder_architecture and not config.multi_query:
            return _by_head(index)(config, width)
        queries = heads // config.num_kv_heads if config.new_decoder_architecture else heads
        start, stop = ((0, queries), (queries, queries + 1), (queries + 1, queries + 2))[index]
        return start * size, width, (stop - start) * size, (queries + 2) * size

    return columns


_BERT = _in_layer(
    "encoder.layer.*",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    ffn_up="intermediate.dense",
    ffn_down="output.dense",
)
_BERT_BESIDE_QKV = {role: _BERT[role] for role in ("o", "ffn_up", "ffn_down")}
_MPNET = _in_layer("encoder.layer.*", **{role: f"attention.attn.{role}" for role in "qkvo"}) | {
    role: _BERT[role] for role in ("ffn_up", "ffn_down")
}
_ALBERT = _in_layer(  # all layers share their weights, and so the adapter
    "encoder.albert_layer_groups.*.albert_layers.*",
    q="attention.query",
    k="attention.key",
    v="attention.value",
    o="attention.dense",
    ffn_up="ffn",
    ffn_down="ffn_output",
)
_DISTILBERT = _in_layer(
    "transformer.layer.*",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    ffn_up="ffn.lin1",
    ffn_down="ffn.lin2",
)
_MODERNBERT = (
    _fused("layers.*.attn.Wqkv", "q", "k", "v")
    | _in_layer("layers.*", o="attn.Wo", ffn_down="mlp.Wo")
    | _fused("layers.*.mlp.Wi", "ffn_gate", "ffn_up")
)
_GPT2 = _fused("h.*.attn.c_attn", "q", "k", "v") | _in_layer(
    "h.*", o="attn.c_proj", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"
)
_GPT_NEO = _in_layer(
    "h.*",
    **{role: f"attn.attention.{role}_proj" for role in "qkv"},
    o="attn.attention.out_proj",
    ffn_up="mlp.c_fc",
    ffn_down="mlp.c_proj",
)
_GPTJ = _in_layer(
    "h.*",
    **{role: f"attn.{role}_proj" for role in "qkv"},
    o="attn.out_proj",
    ffn_up="mlp.fc_in",
    ffn_down="mlp.fc_out",
)


def _neox(layer: str, attention: str, columns: Callable[[int], Columns] = _by_head) -> dict[str, Projection]:
    return _fused(f"{layer}.{attention}.query_key_value", "q", "k", "v", columns=columns) | _in_layer(
        layer, o=f"{attention}.dense", ffn_up="mlp.dense_h_to_4h", ffn_down="mlp.dense_4h_to_h"
    )


_ATTENTION = _in_layer("layers.*", **{role: f"self_attn.{role}_proj" for role in "qkvo"})
_LLAMA = _ATTENTION | _in_layer("layers.*", **{f"ffn_{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")})
_PHI = _ATTENTION | _in_layer("layers.*", o="self_attn.dense", ffn_up="mlp.fc1", ffn_down="mlp.fc2")
_PHI3 = (
    _fused("layers.*.self_attn.qkv_proj", "q", "k", "v", columns=_grouped_query)
    | _in_layer("layers.*", o="self_attn.o_proj", ffn_down="mlp.down_proj")
    | _fused("layers.*.mlp.gate_up_proj", "ffn_gate", "ffn_up")
)
_STARCODER2 = _ATTENTION | _in_layer("layers.*", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj")
# Encoder-decoder models: the attention of both, and the decoder's to the encoder.
_BART = _in_layer("*.layers.*", **{role: f"*.{role}_proj" for role in "qkv"}, o="*.out_proj") | _in_layer(
    "*.layers.*", ffn_up="fc1", ffn_down="fc2"
)
_T5 = _in_layer(
    "*.block.*.layer.*",
    **{role: f"*.{role}" for role in "qkvo"},
    ffn_gate="DenseReluDense.wi_0",  # of T5 1.1 and later
    ffn_up="DenseReluDense.wi|DenseReluDense.wi_1",
    ffn_down="DenseReluDense.wo",
)

_RELATIVE = "an attention with relative positions"
_EXPERTS = "its experts are one tensor for all, not projections"
_NO_EXPERTS = dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), _EXPERTS)


def _decoder(
    projections: Mapping[str, Projection], plain_logits: bool = True, padded_because: str = ""
) -> Architecture:
    return Architecture(projections, padded_because, causal=True, plain_logits=plain_logits)


_ENCODER = Architecture(_BERT)
_ROBERTA = Architecture(_BERT, counts_from_padding=True)
_LLAMA_LIKE = _decoder(_LLAMA)
_SCALED_LOGITS = _decoder(_LLAMA, plain_logits=False)
_MOE = replace(_decoder(_ATTENTION), refused=_NO_EXPERTS)
_SUMMARIZER = Architecture(_BART, padded_because="an encoder and a decoder", several_inputs=True)
_TEXT_TO_TEXT = Architecture(_T5, padded_because=_RELATIVE, several_inputs=True)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _ENCODER,
    "electra": _ENCODER,
    "ernie": _ENCODER,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Architecture(_DISTILBERT),
    "albert": Architecture(_ALBERT),
    "mpnet": Architecture(_MPNET, padded_because=_RELATIVE),
    "modernbert": Architecture(_MODERNBERT, padded_because="a sliding-window attention"),
    "deberta": Architecture(
        _fused("encoder.layer.*.attention.self.in_proj", "q", "k", "v", columns=_by_head) | _BERT_BESIDE_QKV,
        padded_because=_RELATIVE,
    ),
    "deberta-v2": Architecture(
        _BERT | {role: Projection(f"{_BERT[role].path}_proj") for role in "qkv"},
        padded_because=_RELATIVE,
        several_inputs=True,
    ),
    "gpt2": _decoder(_GPT2),
    "gpt_neo": _decoder(_GPT_NEO, padded_because="a sliding-window attention"),
    "gptj": _decoder(_GPTJ, plain_logits=False, padded_because="an attention of its own"),
    "gpt_neox": _decoder(_neox("layers.*", "attention")),
    "bloom": _decoder(_neox("h.*", "self_attention"), padded_because="an attention with ALiBi"),
    "falcon": _decoder(_neox("h.*", "self_attention", _falcon), padded_because="an attention of its own"),
    "opt": _decoder(_BART, padded_because="positions that it counts from the attention mask"),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "granite": _SCALED_LOGITS,
    "cohere": _SCALED_LOGITS,
    "gemma2": _decoder(_LLAMA, plain_logits=False, padded_because="a soft-capped attention"),
    "gemma3_text": _decoder(_LLAMA, plain_logits=False, padded_because="a sliding-window attention"),
    "phi": _decoder(_PHI, plain_logits=False),
    "phi3": _decoder(_PHI3),
    "starcoder2": _decoder(_STARCODER2),
    "mixtral": _MOE,
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "bart": _SUMMARIZER,
    "mbart": _SUMMARIZER,
    "pegasus": _SUMMARIZER,
    "marian": _SUMMARIZER,
    "t5": _TEXT_TO_TEXT,
    "mt5": _TEXT_TO_TEXT,
}
