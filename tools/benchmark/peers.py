"""PEFT and loralib as their users run them, with the plain Trainer. Only this file and `infer_sides` import them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.heads import head_paths
from lora_hf.lora.layers import linear_shape
from lora_hf.lora.target_modules import plan, projections
from tools.benchmark.train_sides import Build, Setup


def _peft_default(setup: Setup) -> Trainer:
    return setup.trainer(_with_peft(setup, setup.plain_base("fp32")))


def _peft_best(setup: Setup) -> Trainer:
    """Rows grouped by length; where bf16 is faster, the base in bf16 and autocast for the adapters, kept in fp32."""
    model = _with_peft(setup, setup.plain_base(setup.fastest))
    return setup.trainer(model, bf16=setup.fastest == "bf16", train_sampling_strategy="group_by_length")


def _with_peft(setup: Setup, model: PreTrainedModel) -> Any:
    import peft

    return peft.get_peft_model(model, peft_config(setup.config.lora, model))


def peft_config(lora: LoraConfig, model: PreTrainedModel, heads: bool = True) -> Any:
    """A config of PEFT that adapts the same modules, with or without a trained copy of the head."""
    import peft

    sites = plan(model, lora)
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type] - annotated as int, but a float works
        lora_dropout=lora.lora_dropout,
        target_modules=list(dict.fromkeys(site.path for site in sites)),
        modules_to_save=head_paths(model) if heads else None,
        fan_in_fan_out=any(site.layout == "conv1d" for site in sites),
    )


def _loralib(setup: Setup) -> Trainer:
    return setup.trainer(with_loralib(setup.plain_base("fp32"), setup.config.lora))


def with_loralib(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """Replaces the target projections by layers of loralib, as its README does, and trains the head too."""
    import loralib

    layers = projections(model)
    slices: dict[str, list[Any]] = {}
    for site in plan(model, lora):
        slices.setdefault(site.path, []).append(site.slice)
    for path, columns in slices.items():
        model.set_submodule(path, _loralib_layer(layers[path], columns, lora))
    loralib.mark_only_lora_as_trainable(model)
    for path in head_paths(model):
        model.get_submodule(path).requires_grad_(True)
    return model


def _loralib_layer(layer: Any, columns: list[tuple[int, int] | None], lora: LoraConfig) -> nn.Module:
    import loralib

    in_features, out_features = linear_shape(layer)
    values: dict[str, Any] = {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "fan_in_fan_out": isinstance(layer, Conv1D),
        "bias": layer.bias is not None,
    }
    parts = [part for part in columns if part is not None]
    if parts:
        width = parts[0][1] - parts[0][0]
        enabled = [(start, start + width) in parts for start in range(0, out_features, width)]
        new: Any = loralib.MergedLinear(in_features, out_features, enable_lora=enabled, **values)
    else:
        new = loralib.Linear(in_features, out_features, **values)
    new.weight.data = layer.weight.data
    if layer.bias is not None:
        new.bias.data = layer.bias.data
    return new


PEER_SIDES: dict[str, Build] = {"peft-default": _peft_default, "peft-best": _peft_best, "loralib": _loralib}
