"""An adapter for mlx-lm: `adapters.safetensors` and its own `adapter_config.json`.

mlx-lm adds `scale * x @ lora_a @ lora_b`, so both are the transposes of A and B, with one rank and one scale for all.
It knows DoRA. Source: mlx_lm/tuner/utils.py, `load_adapters`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from lora_hf.adapters.export.contents import DORA, OUTPUT_HEAD, Contents
from lora_hf.core.errors import AdapterError
from lora_hf.lora.target_modules import layer_of

# The model types whose modules mlx-lm calls as transformers does.
MODEL_TYPES = (
    *("cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral"),
    *("olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
)
_RENAMED = {"gpt2": ("transformer.", "model."), "gpt_neox": ("gpt_neox.layers.", "model.h.")}


def write(contents: Contents, folder: Path) -> list[str]:
    """Writes the two files, and returns how to use them.

    Raises:
        AdapterError: what mlx-lm would drop.
    """
    contents.check("mlx", MODEL_TYPES, holds=(DORA, OUTPUT_HEAD))
    layers = contents.uniform_layers()
    numbers = [number for layer in layers if (number := layer_of(layer.path)) is not None]
    if not numbers:
        raise AdapterError(f"{contents.file.folder}: mlx-lm adapts layers, and this adapter has none; to=merged works")
    tensors = {}
    for layer in layers:
        name = _name(contents.config.model_type, layer.path)
        tensors |= {f"{name}.lora_a": layer.a.T.contiguous(), f"{name}.lora_b": layer.b.T.contiguous()}
        if layer.magnitude is not None:
            tensors[f"{name}.m"] = layer.magnitude
    keys = {re.split(r"\.\d+\.", layer.path, maxsplit=1)[-1] for layer in layers}
    config = {
        "model": contents.base,
        "fine_tune_type": "dora" if DORA in contents.extras else "lora",
        "num_layers": contents.config.num_hidden_layers - min(numbers),  # counted from the last one
        "lora_parameters": {
            "rank": layers[0].rank,
            "scale": layers[0].scaling,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [f"mlx_lm.generate --model {contents.base} --adapter-path DIR"]


def _name(kind: str, path: str) -> str:
    before, after = _RENAMED.get(kind, ("", ""))
    return after + path.removeprefix(before) if path.startswith(before) else path
