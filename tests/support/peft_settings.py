"""The configs with which PEFT writes an adapter for any class of any model type."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_hf.lora.heads import modules_to_train, task_type
from lora_hf.lora.target_modules import layer_of
from tests.support.model_classes import outputs_of

SETTINGS = ("all-linear", "regex", "modules_to_save", "patterns", "rslora", "dora")


def peft_settings(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The fields of PEFT's LoraConfig by setting.

    All name the modules that are random on this base: PEFT knows only heads called classifier, score or qa_outputs.
    """
    whole = modules_to_train(model)
    names = _projection_names(model, whole)
    common = {"r": 4, "lora_alpha": 6, "task_type": task_type(model), "modules_to_save": whole or None}
    common |= {"fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules())}
    return {
        "all-linear": common | {"target_modules": "all-linear"},
        "regex": common | {"target_modules": rf".*\.0\.(.*\.)?({'|'.join(names)})"},
        "modules_to_save": common | {"target_modules": names, "modules_to_save": whole + _norm_and_embedding(model)},
        "patterns": common
        | {"target_modules": names, "rank_pattern": {names[0]: 2}, "alpha_pattern": {r".*\.0\..*": 3}},
        "rslora": common | {"target_modules": names, "use_rslora": True},
        "dora": common | {"target_modules": names, "use_dora": True},
    }


def _projection_names(model: PreTrainedModel, whole: list[str]) -> list[str]:
    """The last parts of the paths of all projections in numbered layers."""
    head = model.get_output_embeddings()
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and layer_of(path) is not None
        and module is not head
        and not _is_in(path, whole)
    ]
    return [name for name in dict.fromkeys(path.rpartition(".")[2] for path in paths) if not name.isdigit()]


def _norm_and_embedding(model: PreTrainedModel) -> list[str]:
    """The last norm outside the layers, and the token embeddings if no other module shares them."""
    whole, parameters = modules_to_train(model), dict(model.named_parameters(remove_duplicate=False))
    tokens: Any = model.get_input_embeddings()
    shared = sum(each is tokens.weight for each in parameters.values()) > 1
    outside = {path: module for path, module in model.named_modules() if path and not _is_in(path, whole)}
    norms = [
        path
        for path, module in outside.items()
        if "norm" in type(module).__name__.lower() and layer_of(path) is None and any(True for _ in module.parameters())
    ]
    return norms[-1:] + [path for path, module in outside.items() if module is tokens and not shared]


def _is_in(path: str, modules: list[str]) -> bool:
    return f"{path}.".startswith(tuple(f"{module}." for module in modules))


def save_without_card(adapted: Any, folder: Path) -> None:
    """Lets PEFT save its adapter without the model card, which takes longer to render than the rest."""
    with patch.object(type(adapted), "create_or_update_model_card"):
        adapted.save_pretrained(str(folder))


def save_random_adapter(model: PreTrainedModel, fields: dict[str, Any], folder: Path) -> torch.Tensor:
    """Lets PEFT save an adapter with random weights, and returns what it computes. It changes the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**fields))
        generator = torch.Generator().manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # little, so that rounding is not amplified from layer to layer
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01
        save_without_card(adapted, folder)
    with torch.no_grad():
        return outputs_of(adapted.get_base_model().eval())
