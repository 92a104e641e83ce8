"""The last layer of a classifier computes the token that its head reads, and all of them if anything else reads them.

That loss and gradients stay those of the padded batch is tested with the batches without padding (`test_unpadding.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.inject import eject, inject
from lora_hf.lora.target_modules import plan
from lora_hf.lora.unpadding import enable_unpadding
from tests import tolerances
from tests.support.small_models import CLASSIFIERS, small_model, token_ids

KINDS = [kind for kind in CLASSIFIERS if kind != "albert" and not ARCHITECTURES[kind].padded_because]
LENGTHS = (7, 3, 5)


def batch() -> dict[str, torch.Tensor]:
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": token_ids().where(mask, 1), "attention_mask": mask.long()}


def tokens_computed(model: PreTrainedModel, run: Callable[[], Any]) -> int:
    """How many tokens the feed-forward network of the last layer multiplies during `run`."""
    path = [site.path for site in plan(model, LoraConfig(targets=("ffn_down",)))][-1]
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    counted, plain = [], getattr(parent, name)

    class Counter(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            counted.append(x.shape[:-1].numel())
            return plain(x)

    setattr(parent, name, Counter())
    run()
    setattr(parent, name, plain)
    return counted[-1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "moe" not in kind and kind not in ("mixtral", "phi3")])
def test_the_last_layer_computes_one_token_a_row(kind: str) -> None:
    model, inputs = small_model(kind, 3), batch()
    padded = model(**inputs).logits
    enable_unpadding(model)
    assert tokens_computed(model, lambda: model(**inputs)) == len(LENGTHS)
    torch.testing.assert_close(model(**inputs).logits, padded, atol=tolerances.PADDING_FREE_FP32, rtol=0)


def test_an_adapter_that_comes_later_is_narrowed_too() -> None:
    model, inputs = small_model("bert", 3), batch()
    plain = model(**inputs).logits
    enable_unpadding(model)
    model(**inputs)
    inject(model, LoraConfig(r=2, targets=("all",)))
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).logits, plain, atol=tolerances.PADDING_FREE_FP32, rtol=0)
        eject(model)


class MaxHead(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :3].amax(1)[:, :3]


@pytest.mark.parametrize("reader", ["base", "hidden states", "hook on the base", "hook on the layer", "another head"])
def test_whatever_else_reads_hidden_states_gets_all_of_them(reader: str) -> None:
    model, inputs, seen = small_model("roberta", 3), batch(), []
    layer = model.roberta.encoder.layer[-1]
    if reader == "another head":
        model.classifier = MaxHead()

    def read() -> torch.Tensor:
        if reader == "base":
            return model.roberta(**inputs).last_hidden_state
        if reader == "hidden states":
            return model(**inputs, output_hidden_states=True).hidden_states[-1]
        output = model(**inputs)
        return seen[-1] if seen else output.logits

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    watched = {"hook on the base": model.roberta, "hook on the layer": layer}.get(reader, nn.Identity())
    handle = watched.register_forward_hook(see)
    padded = read()
    handle.remove()
    enable_unpadding(model)
    watched.register_forward_hook(see)
    free = read()
    inside = inputs["attention_mask"].bool()
    if reader == "hook on the layer":
        padded, free = padded[inside], free[0, : sum(LENGTHS)]  # unpadded, as without this optimization
    elif padded.ndim == 3:
        padded, free = padded[inside], free[inside]
    torch.testing.assert_close(free, padded, atol=tolerances.PADDING_FREE_FP32, rtol=0)


def test_the_last_token_is_the_one_that_transformers_finds() -> None:
    """The rightmost token with another id than padding, even if the mask has tokens of that id after it."""
    model, inputs = small_model("llama", 3), batch()
    inputs["input_ids"][0, 5:] = 1
    padded = model(**inputs).logits
    enable_unpadding(model)
    torch.testing.assert_close(model(**inputs).logits, padded, atol=tolerances.PADDING_FREE_FP32, rtol=0)
