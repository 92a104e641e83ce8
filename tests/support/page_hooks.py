"""Setup before the first block of a page and checks after its last one: `before_PAGE` and `after_PAGE`.

Each hook runs in the session of the page and gets the variables of its Python blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.small_models import token_ids
from tests.tolerances import PARITY_FP32


def before_readme(names: dict[str, Any]) -> None:
    """The page's `rows`: a tokenized dataset with labels."""
    names["rows"] = [{"input_ids": row, "labels": label} for row, label in zip(token_ids(), (0, 1, 1), strict=True)]


def before_from_peft(names: dict[str, Any]) -> None:
    """The page's `batches`: tokenized batches with labels."""
    names["batches"] = [{"input_ids": token_ids(), "labels": torch.tensor([0, 1, 1])}] * 2


def before_from_loralib(names: dict[str, Any]) -> None:
    """`batches`, and a checkpoint in the form of the published ones for GPT-2."""
    from lora_hf.core.config.schema import LoraConfig, ModelConfig
    from lora_hf.data.tasks.registry import get_task
    from lora_hf.models.load import load_base
    from tools.benchmark.peers import with_loralib

    before_from_peft(names)
    gpt2 = load_base(ModelConfig(name="tiny-gpt2", precision="fp32"), get_task("e2e_nlg"))
    with_loralib(gpt2, LoraConfig(r=4, lora_alpha=32, targets=("q", "v")))
    lora = {key: value for key, value in gpt2.state_dict().items() if "lora_" in key}
    torch.save({"model_state_dict": lora}, "gpt2_md_lora_e2e.pt")


def before_serving(names: dict[str, Any]) -> None:
    """The adapters that the page serves, untrained."""
    from tests.support.random_adapters import save_random

    for task in ("sst2", "rte", "e2e_nlg"):
        save_random(Path("outputs", task.removesuffix("_nlg"), "adapter"), task)


def after_readme(names: dict[str, Any]) -> None:
    """The loaded adapter gives the same logits as the model it was saved from."""
    model, plain = (names[name].eval() for name in ("model", "plain"))
    assert torch.equal(plain(token_ids()).logits, model(token_ids()).logits)


def after_from_peft(names: dict[str, Any]) -> None:
    """PEFT's adapter gives the same logits in both libraries."""
    from transformers import AutoModelForSequenceClassification

    from lora_hf import load_adapter

    theirs = names["peft_model"].eval()(token_ids()).logits
    plain = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=2)
    ours = load_adapter(plain, "peft-adapter").eval()(token_ids()).logits
    assert torch.allclose(ours, theirs, atol=PARITY_FP32, rtol=0)
    assert Path("merged-model/model.safetensors").is_file()


def after_from_loralib(names: dict[str, Any]) -> None:
    """The trained checkpoint is the same after conversion in both directions, bit for bit."""
    from lora_hf.lora.inject import lora_state_dict

    original, converted = torch.load("roberta_lora_sst2.bin"), torch.load("back.bin")
    assert original.keys() == converted.keys()
    assert all(torch.equal(original[key], converted[key]) for key in original)
    assert any(value.any() for key, value in original.items() if key.endswith("lora_B")), "the old script did not train"
    assert [name for name in lora_state_dict(names["model"]) if ".biased." in name]


def after_adapters(names: dict[str, Any]) -> None:
    """Every combination on the page wrote its folder."""
    assert all(Path("outputs", name, "combine.json").is_file() for name in ("mix", "short", "ties"))
    assert 0 < names["short"].error < 1


def after_serving(names: dict[str, Any]) -> None:
    """The engine loaded both adapters."""
    assert [adapter.name for adapter in names["engine"].adapters()] == ["e2e", "sst2"]
