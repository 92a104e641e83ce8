"""The public `inject` and `load_adapter`. The models they return work wherever a transformers model does.

`Trainer` (also for its checkpoints), accelerate and `push_to_hub` save a model with `save_pretrained`. Transformers'
method would write the whole model, with parameter names that no other program knows. Here it writes the adapter.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from lora_hf.adapters import save_load
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.lora import inject as injection
from lora_hf.lora.wrappers import on_unwrapped_model


@on_unwrapped_model()
def inject(model: PreTrainedModel, lora: LoraConfig, name: str = "default") -> PreTrainedModel:
    """Replaces the projections that `lora` names with LoRA layers, copies the task head and freezes the rest.

    Modules that the checkpoint did not initialize are copied, trained and saved like the head. Until `eject`,
    `model.save_pretrained` writes the active adapter.

    Args:
        model: a transformers model, or a module that contains one; changed in place and returned.
        name: the name of the adapter; a model can have any number of adapters.

    Raises:
        ModelError: `model` is not a transformers model, or has random parameters that the adapter could not save.
        ConfigError: a target matches nothing, or a rank exceeds the smaller dimension of a projection.
        AdapterError: the name is taken or invalid.
    """
    if not isinstance(lora, LoraConfig):
        kind = f"{type(lora).__module__.partition('.')[0]}.{type(lora).__name__}"
        raise ConfigError(
            f"inject: expected a lora_hf.LoraConfig, found {kind}; lora_hf.LoraConfig accepts PEFT's names, such as r, "
            "lora_alpha and target_modules"
        )
    return _with_save_pretrained(injection.inject(model, lora, name))


@on_unwrapped_model()
def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    name: str = "default",
    own_head: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Loads the adapter in `folder` onto a plain or already adapted model as adapter `name`, and activates it.

    The loaded adapter is trainable; everything else is frozen. Until `eject`, `model.save_pretrained` writes the active
    adapter.

    Args:
        folder: an adapter folder, or the hub id of an adapter, `user/name`.
        own_head: allow labels that differ from the model's, even in number. The model has these labels while the
            adapter is active. Use this for adapters of several tasks on one base.
        revision: a branch, tag or commit of the hub repository.

    Raises:
        HubError: the hub is out of reach, refuses, or has no such adapter.
        AdapterError: the folder is not a readable adapter, or does not fit this model: a missing or extra tensor, a
            wrong shape, another base, other labels. The model is unchanged.
    """
    return _with_save_pretrained(save_load.load_adapter(model, folder, name, own_head, revision))


def _with_save_pretrained(model: PreTrainedModel) -> PreTrainedModel:
    model.save_pretrained = functools.partial(_save_pretrained, model)  # type: ignore[method-assign]
    return model


def _save_pretrained(
    model: PreTrainedModel, save_directory: str | Path, is_main_process: bool = True, **ignored: Any
) -> None:
    """Writes the active adapter in PEFT's format, and a second copy for Trainer's `resume_from_checkpoint`."""
    name = injection.adapter_state(model).active_adapter
    if name is None:
        raise AdapterError("save_pretrained: no adapter is active; first call set_adapter(model, name) to choose one")
    if not is_main_process:
        return
    folder = save_load.save_adapter(model, save_directory, name)
    # Trainer restores a model that PEFT did not wrap from this file, by the names in its `state_dict`.
    trained: dict[str, torch.Tensor] = {key: each for key, each in model.named_parameters() if each.requires_grad}
    trained |= {key: each for key, each in model.named_buffers() if f".adapters.{name}." in key}  # PiSSA's start
    tensors = {key: tensor.detach().clone().cpu().contiguous() for key, tensor in trained.items()}
    save_file(tensors, folder / SAFE_WEIGHTS_NAME)
