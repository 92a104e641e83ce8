"""An adapter for vLLM: PEFT's two files with one rank and one scaling for all modules.

vLLM reserves memory for `--max-lora-rank`, and its older versions ignore `rank_pattern` and `alpha_pattern`. Of the
fully trained modules it takes the head of a classifier, if that is a single projection. Source: vllm/lora,
`peft_helper.py` and `lora_model.py`.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from lora_hf.adapters.export.contents import WHOLE_MODULES, Contents
from lora_hf.adapters.format import write_adapter
from lora_hf.adapters.peft_config import PREFIX

# The model types that vLLM loads adapters for, under the names that transformers has.
MODEL_TYPES = ("cohere", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3")
HEADS = ("score", "classifier")  # the names of a head that vLLM takes from an adapter
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank


def write(contents: Contents, folder: Path) -> list[str]:
    """Writes the two files, and returns how to use them.

    Raises:
        AdapterError: what vLLM would drop or refuse.
    """
    heads = _heads(contents)
    contents.check("vllm", MODEL_TYPES, holds=(WHOLE_MODULES,) if heads else ())
    layers = contents.uniform_layers()
    rank, scaling = layers[0].rank, layers[0].scaling
    file = contents.file
    tensors = {key: tensor for key, tensor in file.tensors.items() if key.startswith(heads)} if heads else {}
    for layer in layers:
        tensors |= {f"{PREFIX}{layer.path}.lora_A.weight": layer.a, f"{PREFIX}{layer.path}.lora_B.weight": layer.b}
    config = {
        **file.config,
        "base_model_name_or_path": contents.base,
        "r": rank,
        "lora_alpha": rank * scaling,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
    }
    # The padded A and B are those of the whole output, and those of PiSSA and OLoRA hold their start.
    write_adapter(folder, config, tensors, replace(file.metadata, base=contents.base, slices={}, start=""))
    limit = next((each for each in RANKS if each >= rank), rank)
    command = f"vllm serve {contents.base} --enable-lora --max-lora-rank {limit} --lora-modules NAME=DIR"
    return [command + _overrides(contents) if heads else command]


def _heads(contents: Contents) -> tuple[str, ...]:
    """The prefixes of the head's tensors, if it is all that was fully trained and vLLM can load it."""
    whole = contents.extras.get(WHOLE_MODULES, [])
    prefixes = tuple(f"{PREFIX}{name}." for name in whole)
    owned = {key.removeprefix(PREFIX) for key in contents.file.tensors if prefixes and key.startswith(prefixes)}
    plain = all(key.removeprefix(f"{name}.") in ("weight", "bias") for name in whole for key in owned)
    return prefixes if len(whole) == 1 and whole[0] in HEADS and plain else ()


def _overrides(contents: Contents) -> str:
    """The base as a classifier with the labels of the adapter: the checkpoint of a base has none."""
    architecture = type(contents.model).__name__
    overrides = f'{{"architectures": ["{architecture}"], "num_labels": {contents.config.num_labels}}}'
    return f" --hf-overrides {shlex.quote(overrides)}"
