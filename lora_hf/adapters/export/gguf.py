"""An adapter for llama.cpp's `--lora`: a GGUF file with `<tensor>.lora_a` and `<tensor>.lora_b`.

llama.cpp adds `alpha / rank * lora_b @ lora_a`, with one alpha for the file and the rank of each tensor. The names are
those of a base that `convert_hf_to_gguf.py` wrote, and so is the order of the rows, which differs from transformers' in
some projections. Source: llama.cpp, `conversion/` and `src/llama-adapter.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lora_hf.adapters.export.contents import OUTPUT_HEAD, Contents, most_common
from lora_hf.core.config.schema import ROLES, LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError, how_to_install
from lora_hf.lora import architectures
from lora_hf.lora.target_modules import layer_of, plan

ADAPTER_FILE = "adapter.gguf"

RowOrder = Callable[[PretrainedConfig, int], Tensor]  # from the base's config and the rows: the index of each row


@dataclass(frozen=True)
class GgufArchitecture:
    """llama.cpp's name of a model type, and the projections, by role, whose rows it stores in another order."""

    name: str
    row_orders: Mapping[str, RowOrder] = field(default_factory=dict)


def _interleaved(heads: str) -> RowOrder:
    """The halves of each head, which rotary embeddings turn together, row by row (`LlamaModel.permute`)."""

    def order(config: Any, rows: int) -> Tensor:
        count = getattr(config, heads)
        return torch.arange(rows).view(count, 2, rows // count // 2).mT.flatten()

    return order


def _query_key_value(config: Any, rows: int) -> Tensor:
    """All heads of q, then of k, then of v; transformers has q, k and v of each head."""
    count = config.num_attention_heads
    return torch.arange(rows).view(count, 3, rows // count // 3).transpose(0, 1).flatten()


_ROTARY = {"q": _interleaved("num_attention_heads"), "k": _interleaved("num_key_value_heads")}
_BY_HEAD = {"q k v": _query_key_value}

ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", _ROTARY),
    "mistral": GgufArchitecture("llama", _ROTARY),
    "mixtral": GgufArchitecture("llama", _ROTARY),
    "smollm3": GgufArchitecture("smollm3", _ROTARY),
    "granite": GgufArchitecture("granite", _ROTARY),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "qwen2_moe": GgufArchitecture("qwen2moe"),
    "qwen3_moe": GgufArchitecture("qwen3moe"),
    "gemma": GgufArchitecture("gemma"),
    "gemma2": GgufArchitecture("gemma2"),
    "gemma3_text": GgufArchitecture("gemma3"),
    "cohere": GgufArchitecture("command-r"),
    "olmo2": GgufArchitecture("olmo2"),
    "starcoder2": GgufArchitecture("starcoder2"),
    "phi": GgufArchitecture("phi2"),
    "phi3": GgufArchitecture("phi3"),
    "gpt2": GgufArchitecture("gpt2"),
    "gpt_neox": GgufArchitecture("gptneox", _BY_HEAD),
    "bloom": GgufArchitecture("bloom", _BY_HEAD),
    "bert": GgufArchitecture("bert"),
    "roberta": GgufArchitecture("bert"),
    "xlm-roberta": GgufArchitecture("bert"),
}

# A projection in a layer by its role, or by the roles that it fuses.
_TENSORS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q k v": "attn_qkv",
    "o": "attn_output",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_up ffn_gate": "ffn_up",  # gate first, as in transformers
    "ffn_down": "ffn_down",
}


def write(contents: Contents, folder: Path) -> list[str]:
    """Writes `adapter.gguf`, and returns how to use it.

    Raises:
        AdapterError: what the adapter trained besides A and B, or a module without a counterpart.
        ConfigError: the package gguf is not installed.
    """
    contents.check("gguf", ARCHITECTURES, holds=(OUTPUT_HEAD,))
    architecture = ARCHITECTURES[contents.config.model_type]
    names = tensor_names(contents)
    alpha = most_common([layer.scaling * layer.rank for layer in contents.layers])
    gguf = _import_gguf()
    writer = gguf.GGUFWriter(folder / ADAPTER_FILE, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for layer in contents.layers:
        role, name = names[layer.path]
        b = layer.with_scaling(alpha / layer.rank).b
        if role in architecture.row_orders:
            b = b[architecture.row_orders[role](contents.config, len(b))]
        writer.add_tensor(f"{name}.weight.lora_a", layer.a.numpy())
        writer.add_tensor(f"{name}.weight.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [
        "the base needs to be a GGUF file too, made by llama.cpp's convert_hf_to_gguf.py",
        f"llama-cli --model BASE.gguf --lora DIR/{ADAPTER_FILE}",
    ]


def tensor_names(contents: Contents) -> dict[str, tuple[str, str]]:
    """The role, or roles, of each adapted module and the name of its tensor without `.weight`, by module path."""
    kind = contents.config.model_type
    known = tuple(role for role in ROLES if role in architectures.ARCHITECTURES[kind].projections)
    roles: dict[str, list[str]] = {}
    for site in plan(contents.model, LoraConfig(targets=known)):
        roles.setdefault(site.path, []).append(site.role)
    heads = contents.extras.get(OUTPUT_HEAD, ())
    names = {}
    for layer in contents.layers:
        role, number = " ".join(sorted(roles.get(layer.path, ()), key=ROLES.index)), layer_of(layer.path)
        if layer.path in heads:
            names[layer.path] = ("", "output")
        elif role in _TENSORS:
            names[layer.path] = (role, f"blk.{number}.{_TENSORS[role]}")
    unknown = [layer.path for layer in contents.layers if layer.path not in names]
    if unknown:
        raise AdapterError(
            f"{contents.file.folder}: {', '.join(unknown[:3])}: no tensor of llama.cpp's "
            f"{ARCHITECTURES[kind].name} is known for it; to=merged writes a plain model"
        )
    return names


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"GGUF files need the package gguf: {how_to_install('export')}") from error
    return gguf
