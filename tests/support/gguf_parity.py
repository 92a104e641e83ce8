"""The GGUF file of every model type beside the one that llama.cpp's own converter writes.

`python -m tests.support.gguf_parity --llama-cpp DIR --output FILE` writes a record for docs/export.md. DIR is a clone
of llama.cpp, whose `convert_lora_to_gguf.py` runs in this process. It knows neither patterns of alphas nor a transposed
GPT-2, so the adapters have one rank and one alpha, on whole projections.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

from lora_hf.adapters.export.gguf import ADAPTER_FILE, ARCHITECTURES
from lora_hf.adapters.export.targets import export_adapter
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.provenance import git_state, versions
from lora_hf.lora.inject import inject
from tests.support.small_models import SHAPES, randomize_lora_b, small_config

ENCODERS = ("bert", "roberta", "xlm-roberta")


def updates(file: Path) -> dict[str, np.ndarray]:
    """`alpha / rank * lora_b @ lora_a` by the name of the tensor."""
    import gguf

    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {each.name: np.array(each.data).reshape(each.shape.tolist()[::-1]) for each in reader.tensors}
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: alpha / len(tensors[f"{name}.lora_a"]) * product(tensors, name) for name in names}


def product(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    return tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]


def compare(kind: str, folder: Path, llama_cpp: Path) -> dict[str, Any]:
    auto: Any = AutoModel if kind in ENCODERS else AutoModelForCausalLM
    auto.from_config(small_config(kind)).save_pretrained(folder / "base")
    model = auto.from_pretrained(folder / "base", dtype=torch.float32)
    targets = ("q", "k", "v", "o") if SHAPES[kind].get("num_experts") else ("all-linear",)
    if kind in ENCODERS:
        targets = (r".*layer.*(query|key|value|dense)",)
    inject(model, LoraConfig(r=2, lora_alpha=6, targets=targets))
    randomize_lora_b(model)
    save_adapter(model, folder / "adapter")
    export_adapter(folder / "adapter", "gguf", folder / "ours")
    try:
        convert(folder, llama_cpp)
    # The converter is not ours and raises anything.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return {"model_type": kind, "failed": f"{type(error).__name__}: {error}"}
    ours, theirs = updates(folder / "ours" / ADAPTER_FILE), updates(folder / "theirs.gguf")
    if ours.keys() != theirs.keys():
        return {"model_type": kind, "failed": f"other names: {sorted(ours.keys() ^ theirs.keys())}"}
    if any(ours[name].shape != theirs[name].shape for name in ours):
        return {"model_type": kind, "failed": "its tensors are transposed, and llama.cpp does not load them"}
    return {
        "model_type": kind,
        "tensors": len(ours),
        "largest_difference": max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours),
    }


def convert(folder: Path, llama_cpp: Path) -> None:
    given = sys.argv
    sys.argv = ["", "--base", str(folder / "base"), "--outfile", str(folder / "theirs.gguf"), str(folder / "adapter")]
    try:
        runpy.run_path(str(llama_cpp / "convert_lora_to_gguf.py"), run_name="__main__")
    finally:
        sys.argv = given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()
    sys.path[:0] = [str(options.llama_cpp / "gguf-py"), str(options.llama_cpp)]  # as its scripts expect
    checks = []
    with tempfile.TemporaryDirectory() as tmp:
        for kind in ARCHITECTURES:
            checks.append(compare(kind, Path(tmp) / kind, options.llama_cpp))
            print(checks[-1], flush=True)
    record = {"converter": "convert_lora_to_gguf.py", "checks": checks, "versions": versions(), "git": git_state()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
