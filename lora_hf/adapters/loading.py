"""A trained run's model, ready to answer: its base, with the adapter on it, where the machine computes fastest."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.resolve import Saved
from lora_hf.adapters.save_load import load_adapter
from lora_hf.lora.inject import eject, merge
from lora_hf.models.load import dequantise, load_base, load_tokenizer, quantise


def load_saved(saved: Saved, precision: str, adapted: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The adapter on its base, or the whole model, in evaluation mode and on the GPU where there is one; its tokenizer.

    Args:
        precision: of the base, or of the whole model, as in a config; LoRA and head are always fp32. `int8` is for
            inference on the CPU, where the model stays: the adapter merged, the projections multiplied in integers.
        adapted: False leaves the adapter out, for the bare base. A whole model has no base without its training.

    Raises:
        AdapterError: the adapter is damaged or does not fit the base.
        ModelError, HubError: the base cannot be loaded.
    """
    dynamic = precision == "int8"
    config = replace(saved.model, precision="fp32" if dynamic else precision)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(config)
    model = load_base(config, saved.task, saved.seed)
    if adapted and not saved.whole:
        load_adapter(model, saved.folder)
    model.eval()
    if dynamic:
        return quantise(eject(merge(dequantise(model))), "int8", dynamic=True), tokenizer
    if torch.cuda.is_available():
        model.to(torch.device("cuda"))  # type: ignore[call-arg]
    return model, tokenizer
