"""Runs one input of the fuzzer: bytes that become an adapter folder, which must be rejected or loaded correctly.

An input has five parts between NUL bytes, so that mutations of one part leave the others readable: the kind of base,
adapter_config.json, the header that lora_hf adds, the table of tensors, and their bytes.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lora_hf.adapters.format import CONFIG_FILE, HEADER, WEIGHTS_FILE, read_adapter
from lora_hf.adapters.peft_config import base_dependent_init
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import UserError
from lora_hf.lora.fingerprint import fingerprint
from lora_hf.lora.inject import eject, inject
from tests.support.small_models import randomize_lora_b, small_model

PARTS = 5
SHAPE = {
    "roberta": {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "max_position_embeddings": 8},
    "gpt2": {"n_embd": 4, "n_inner": 4, "n_head": 1, "n_positions": 8},
}
LAYERS = {"roberta": "num_hidden_layers", "gpt2": "n_layer"}
LABELS = {"roberta": 2, "gpt2": None}

# The adapters of the seed inputs: the base and its LoRA.
SEEDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("roberta", {"targets": ("q",)}),
    "ranks": ("roberta", {"targets": ("q", "v"), "rank_pattern": {"v": 2}, "use_rslora": True}),
    "dora": ("roberta", {"targets": ("q",), "use_dora": True}),
    "biases": ("roberta", {"targets": ("q",), "bias": "all"}),
    "pissa": ("roberta", {"targets": ("q",), "init_lora_weights": "pissa"}),
    "embeddings": ("roberta", {"targets": ("embeddings",)}),
    "slices": ("gpt2", {"targets": ("q", "v")}),
}


class Harness:
    """Tiny bases, and a folder for the input."""

    def __init__(self) -> None:
        self.bases: dict[str, Any] = {kind: tiny_base(kind) for kind in SHAPE}
        self.fingerprints = {kind: fingerprint(base) for kind, base in self.bases.items()}
        self.folder = tempfile.TemporaryDirectory()

    def close(self) -> None:
        self.folder.cleanup()

    def run(self, data: bytes) -> str:
        """The outcome, `refused` or `used`. Any other outcome raises."""
        folder = Path(self.folder.name)
        kind = unpack(data, folder)
        with suppress(UserError):
            find_saved_model(folder)
        try:
            model = load_adapter(self.bases[kind], folder)
            self._check(model, folder)
        except UserError:
            return "refused"
        else:
            return "used"
        finally:
            self.bases[kind] = eject(self.bases[kind])
            assert fingerprint(self.bases[kind]) == self.fingerprints[kind], "the base was changed"

    def _check(self, model: Any, folder: Path) -> None:
        """Checks that the loaded tensors are those of the file."""
        file = read_adapter(folder)
        if base_dependent_init(file)[0]:
            return  # saved relative to its initial weights
        again = read_adapter(save_adapter(model, folder / "again")).tensors
        for key, tensor in again.items():
            assert torch.equal(tensor, file.tensors[key].float()), f"{key} differs from the file"


def tiny_base(kind: str) -> Any:
    """A base with one layer of width 4."""
    return small_model(kind, LABELS[kind], vocab_size=6, **{LAYERS[kind]: 1}, **SHAPE[kind])


def unpack(data: bytes, folder: Path) -> str:
    """Writes the two files of an input; returns the kind of its base."""
    parts = data.split(b"\0", PARTS - 1)
    kind, config, metadata, table, values = parts + [b""] * (PARTS - len(parts))
    try:
        header = json.loads(table)
        if metadata:
            header["__metadata__"] = {HEADER: metadata.decode("utf-8", "replace")}
        table = json.dumps(header).encode()
        table += b" " * (-len(table) % 8)
    except (ValueError, TypeError, RecursionError):
        pass  # keep the invalid table
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS_FILE).write_bytes(len(table).to_bytes(8, "little") + table + values)
    return "gpt2" if kind == b"gpt2" else "roberta"


def pack(kind: str, folder: Path) -> bytes:
    """The input from which `unpack` writes this adapter folder."""
    weights = (folder / WEIGHTS_FILE).read_bytes()
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:end])
    metadata = header.pop("__metadata__")[HEADER]
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    parts = [kind, json.dumps(config), metadata, json.dumps(header)]
    return b"\0".join([*(part.encode() for part in parts), weights[end:]])


def seed_inputs() -> dict[str, bytes]:
    """A valid adapter of each kind, from which fuzzing starts."""
    inputs = {}
    for name, (kind, lora) in SEEDS.items():
        model = inject(tiny_base(kind), LoraConfig(**{"r": 1, "lora_alpha": 1, **lora}))
        randomize_lora_b(model)
        with tempfile.TemporaryDirectory() as folder:
            inputs[name] = pack(kind, save_adapter(model, folder, task="rule-sentiment"))
    return inputs
