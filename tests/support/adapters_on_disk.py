"""Run folders like those that training writes, but without training."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig, ModelConfig, RunConfig, TaskConfig
from lora_hf.core.records import RUN_CONFIG_FILE, RunRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.inject import inject
from lora_hf.models.load import load_base, load_tokenizer
from tests.support.small_models import randomize_lora_b

TASK = get_task("rule-sentiment")


def run_folder(folder: Path, base: str = "tiny-roberta", seed: int = 7) -> Path:
    """Writes a run folder with config and record, and returns the folder of its adapter. `base` may be any folder."""
    config = RunConfig(
        ModelConfig(name=base, precision="fp32"),
        TaskConfig(TASK.name, data_dir=str(folder / "data"), max_length=64),
        LoraConfig(r=4, lora_alpha=8, targets=("q", "v")),
    )
    model = inject(load_base(config.model, TASK), config.lora)
    randomize_lora_b(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    save_adapter(model, folder / "adapter", task=TASK.name, tokenizer=load_tokenizer(config.model))
    (folder / RUN_CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    RunRecord(
        task=TASK.name,
        method="lora",
        model=base,
        config=config.to_dict(),
        seed=3,
        started="2026-01-01T00:00:00+00:00",
        parameters={"total": 5000000, "trainable": 41234, "lora": 40000, "head": 1234},
        rows={"train": 2000, "validation": 500},
        metrics={"validation": {"accuracy": 0.8125}},
        majority={"validation": {"accuracy": 0.5}},
        best={"metric": "eval_validation_accuracy", "value": 0.8125, "step": 61},
        warnings=["validation: something that a person should not overlook"],
        versions={"python": "3.11.7", "lora-hf": "0.1.0", "torch": "2.13.0"},
        git={"commit": "0123456789abcdef", "changed": True},
    ).save(folder)
    return folder / "adapter"
