from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from lora_hf.core.config.schema import LoraConfig, RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.lora.inject import inject
from lora_hf.training.optimizer import apply_loraplus
from lora_hf.training.run import train
from lora_hf.training.trainer import AdapterTrainer
from tests.support.small_models import small_model


def test_the_faster_parameters_move_and_keep_their_other_settings() -> None:
    slow, fast, plain = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    groups = [{"params": [slow, fast], "weight_decay": 0.1}, {"params": [plain], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9))
    apply_loraplus(optimizer, [fast], 16)
    found = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(1, 1e-3, 0.1), (1, 1e-3, 0.0), (1, 16e-3, 0.1)]
    assert optimizer.param_groups[2]["params"][0] is fast
    assert optimizer.param_groups[2]["betas"] == (0.8, 0.9)


def test_b_steps_so_many_times_farther_and_nothing_else_does(tmp_path: Path) -> None:
    """The definition by hand: under SGD a step is the learning rate times the gradient."""
    model = inject(small_model("roberta", 3), LoraConfig(r=2))
    arguments = TrainingArguments(str(tmp_path), optim="sgd", learning_rate=0.5, report_to="none", use_cpu=True)
    trainer = AdapterTrainer(model, arguments)
    trainer.loraplus_lr_ratio = 8
    trainer.create_optimizer_and_scheduler(10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    trainer.optimizer.step()
    for name, parameter in model.named_parameters():
        step = (4.0 if "lora_B" in name else 0.5) if parameter.requires_grad else 0.0
        assert torch.allclose(before[name] - parameter, torch.tensor(step)), name
    assert trainer.create_optimizer() is trainer.optimizer
    assert len(trainer.optimizer.param_groups) == 3, "asked again, it does not split again"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio: expected a number > 0, found 0"),
        ({"loraplus_ratio": 4}, "loraplus_ratio: unknown key (did you mean 'loraplus_lr_ratio'?)"),
        ({"loraplus_lr_ratio": 4, "method": "head"}, "train.loraplus_lr_ratio: train.method=head trains no lora_B"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        train(RunConfig.from_dict({"train": section, "output": {"dir": str(tmp_path), "plots": False}}))
    assert message in str(error.value)
