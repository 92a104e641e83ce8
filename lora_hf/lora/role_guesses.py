"""The roles of projections in a model type that the role table does not have, guessed from their names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from lora_hf.lora.layers import linear_shape

# The last segment of a path, and for names that attention and FFN share also the one before.
_NAMES = {
    "q": r"q|q_proj|query|query_proj|q_lin|q_linear|to_q|wq|linear_q",
    "k": r"k|k_proj|key|key_proj|k_lin|k_linear|to_k|wk|linear_k",
    "v": r"v|v_proj|value|value_proj|v_lin|v_linear|to_v|wv|linear_v",
    "o": r"o|o_proj|out_proj|out_lin|to_out|linear_out|attention\.output\.dense"
    r"|(self_attn|self_attention|attn|attention)\.(dense|c_proj|wo|proj)",
    "ffn_gate": r"gate_proj|wi_0|w1",
    "ffn_up": r"up_proj|fc1|c_fc|fc_in|lin1|wi|wi_1|w3|dense_h_to_4h|intermediate\.dense|linear1",
    "ffn_down": r"down_proj|fc2|fc_out|lin2|wo|w2|dense_4h_to_h|output\.dense|mlp\.c_proj|linear2",
}
_EXPRESSIONS = {role: re.compile(rf"(?:.*\.)?(?:{names})", re.IGNORECASE) for role, names in _NAMES.items()}


def guess_roles(modules: Mapping[str, nn.Module], hidden_size: int | None) -> dict[str, str]:
    """The role of each projection whose name and shape tell it, by path.

    A projection that fuses several roles (`qkv_proj`, `Wqkv`, `c_attn`) gets none: how it arranges them is not in its
    name.

    Args:
        hidden_size: the width of the hidden states, which each role reads or writes; None if it varies.
    """
    guesses = {}
    for path, module in modules.items():
        role = next((role for role, expression in _EXPRESSIONS.items() if expression.fullmatch(path)), None)
        if role is None:
            continue
        inputs, outputs = linear_shape(module)
        if hidden_size in (None, outputs if role in ("o", "ffn_down") else inputs):
            guesses[path] = role
    return guesses
