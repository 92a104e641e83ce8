"""The files of mlx-lm, rebuilt from their tensors; and mlx-lm itself, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_hf.adapters.export.mlx import _name
from lora_hf.adapters.export.targets import export_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.inject import lora_layers
from tests.support.export_checks import IDS, LORA, mlx_logits, our_logits, save_base, save_random_adapter
from tests.tolerances import EXPORT_DELTA, MLX_LOGITS

HEAD = LoraConfig(r=3, targets=("v", "lm_head"))
DORA = LoraConfig(r=3, targets=("q", "v"), layers=(1,), use_dora=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_the_files_hold_the_update_of_every_module(kind: str, tmp_path: Path) -> None:
    model = save_random_adapter(save_base(kind, tmp_path / "base"), tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", "mlx", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    parameters = config["lora_parameters"]
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 2)
    assert {tensor.shape[1] for name, tensor in tensors.items() if name.endswith("lora_a")} == {parameters["rank"]}
    for path, layer in lora_layers(model).items():
        assert any(path.endswith(f".{key}") for key in parameters["keys"])
        a, b = (tensors[f"{_name(kind, path)}.lora_{part}"] for part in "ab")
        found = (a @ b).T * parameters["scale"]
        assert torch.allclose(found, layer.delta_weight("default").detach(), atol=EXPORT_DELTA), path


def test_dora_keeps_its_magnitudes_and_layers_count_from_the_last(tmp_path: Path) -> None:
    model = save_random_adapter(save_base("llama", tmp_path / "base"), tmp_path / "adapter", DORA)
    export_adapter(tmp_path / "adapter", "mlx", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("dora", 1)
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    path = "model.layers.1.self_attn.q_proj"
    magnitudes = lora_layers(model)[path].adapters["default"].lora_magnitude_vector
    assert torch.equal(tensors[f"{path}.m"], magnitudes)


@pytest.mark.parametrize(("kind", "lora"), [("llama", LORA), ("gpt2", LORA), ("llama", DORA), ("llama", HEAD)])
def test_mlx_lm_computes_the_same(kind: str, lora: LoraConfig, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    pytest.importorskip("mlx.core", reason="mlx has no library for this machine")
    model = save_random_adapter(save_base(kind, tmp_path / "base"), tmp_path / "adapter", lora)
    export_adapter(tmp_path / "adapter", "mlx", tmp_path / "out")
    expected = our_logits(model, "default", IDS)
    assert np.abs(mlx_logits(tmp_path / "base", tmp_path / "out", IDS) - expected).max() <= MLX_LOGITS
    assert np.abs(mlx_logits(tmp_path / "base", None, IDS) - expected).max() > 100 * MLX_LOGITS
