"""What a page finds before its first block, and what must be true after its last; run in the session of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.small import token_ids
from tests.tolerances import PARITY_FP32


def before_readme(names: dict[str, Any]) -> None:
    """`rows` is any tokenised data set with labels, says the page."""
    names["rows"] = [{"input_ids": row, "labels": label} for row, label in zip(token_ids(), (0, 1, 1), strict=True)]


def before_from_peft(names: dict[str, Any]) -> None:
    """`batches` is any iterable of tokenised batches with labels, says the page."""
    names["batches"] = [{"input_ids": token_ids(), "labels": torch.tensor([0, 1, 1])}] * 2


def before_from_loralib(names: dict[str, Any]) -> None:
    """The same, and a checkpoint as the published ones of GPT-2 are."""
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
    """The adapters of the page, where it has them."""
    from tests.support.random_adapters import save_random

    for task in ("sst2", "rte", "e2e_nlg"):
        save_random(Path("outputs", task.removesuffix("_nlg"), "adapter"), task)


def after_readme(names: dict[str, Any]) -> None:
    """The adapter that was saved and loaded answers as the model that it was saved from."""
    model, plain = (names[name].eval() for name in ("model", "plain"))
    assert torch.equal(plain(token_ids()).logits, model(token_ids()).logits)


def after_from_peft(names: dict[str, Any]) -> None:
    """PEFT's adapter answers alike on both sides."""
    from transformers import AutoModelForSequenceClassification

    from lora_hf import load_adapter

    theirs = names["peft_model"].eval()(token_ids()).logits
    plain = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=2)
    ours = load_adapter(plain, "peft-adapter").eval()(token_ids()).logits
    assert torch.allclose(ours, theirs, atol=PARITY_FP32, rtol=0)
    assert Path("merged-model/model.safetensors").is_file()


def after_from_loralib(names: dict[str, Any]) -> None:
    """There and back, bit for bit, and of a checkpoint that was trained."""
    from lora_hf.lora.inject import lora_state_dict

    old, back = torch.load("roberta_lora_sst2.bin"), torch.load("back.bin")
    assert old.keys() == back.keys()
    assert all(torch.equal(old[key], back[key]) for key in old)
    assert any(value.any() for key, value in old.items() if key.endswith("lora_B")), "the old script must have trained"
    assert [name for name in lora_state_dict(names["model"]) if ".biased." in name]


def after_adapters(names: dict[str, Any]) -> None:
    """The folders that the page combines, and what it printed of them."""
    assert all(Path("outputs", name, "combine.json").is_file() for name in ("mix", "short", "ties"))
    assert 0 < names["short"].error < 1


def after_serving(names: dict[str, Any]) -> None:
    """The engine served both."""
    assert [adapter.name for adapter in names["engine"].adapters()] == ["e2e", "sst2"]
