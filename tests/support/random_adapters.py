"""Random adapters for several tasks on the bundled bases."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.inject import inject
from lora_hf.models.load import load_base
from tests.support.small_models import randomize_lora_b

TEXTS = ("A warm, funny film.", "A dull film without a single idea.", "It has its moments.", "Never again!")
PROMPTS = ("name[The Vaults], eatType[pub]", "name[Aromi], food[Italian], area[riverside]", "name[Zizzi]")


def save_random(folder: Path, task: str = "rule-sentiment", seed: int = 7, **lora: object) -> Path:
    """Saves an adapter for `task`; adapters of different seeds give different answers."""
    spec = get_task(task)
    generates = spec.model_kind == "causal-lm"
    config = ModelConfig(name="tiny-gpt2" if generates else "tiny-roberta", precision="fp32")
    settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "targets": ("q", "v"), **lora})  # type: ignore[arg-type]
    model = inject(load_base(config, spec), settings)
    randomize_lora_b(model, seed, std=0.05 if generates else 0.5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return save_adapter(model, folder, task=task)
