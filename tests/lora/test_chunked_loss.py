"""A head computed at labels alone gives the loss and the gradients of all logits."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import TrainingError
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.chunked_loss import enable_chunked_loss
from lora_hf.lora.inject import inject
from lora_hf.training.trainer import completion_loss, enable_optimizations
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import PARITY_FP32


def inputs() -> dict[str, torch.Tensor]:
    ids = token_ids()
    labels = ids.clone()
    labels[0, :4] = labels[1, :2] = -100
    labels[2] = -100
    labels[2, 6] = ids[2, 6]  # a row with one label
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("kind", [kind for kind, entry in ARCHITECTURES.items() if entry.plain_logits])
@pytest.mark.parametrize(
    ("smoothing", "items"),
    [
        (0.0, None),
        (0.1, 40),
        pytest.param(0.0, 40, marks=pytest.mark.full),
        pytest.param(0.1, None, marks=pytest.mark.full),
    ],
)
def test_loss_gradients_and_row_sums_are_those_of_all_logits(kind: str, smoothing: float, items: int | None) -> None:
    found = []
    for selective in (False, True):
        model = inject(small_model(kind), LoraConfig(r=2, targets=("all",))).train()
        for module in model.modules():
            module.training = module.training and not isinstance(module, torch.nn.Dropout)
        randomize_lora_b(model)
        batch = inputs()
        if selective:
            assert enable_chunked_loss(model, smoothing)
            output = model(**batch, num_items_in_batch=items)
            loss, rows = output.loss, output.rows
        else:
            logits = model(input_ids=batch["input_ids"]).logits
            loss = LabelSmoother(smoothing)({"logits": logits}, batch["labels"], True, items)
            rows = completion_loss(logits, batch["labels"])
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), rows.detach(), gradients))
    (loss, rows, gradients), (fast_loss, fast_rows, fast_gradients) = found
    assert torch.allclose(fast_loss, loss, atol=PARITY_FP32)
    assert torch.allclose(fast_rows, rows, atol=10 * PARITY_FP32)
    assert gradients.keys() == fast_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(fast_gradients[name], gradient, atol=PARITY_FP32), name


def test_an_evaluation_is_not_smoothed() -> None:
    model = small_model("gpt2").requires_grad_(False)
    plain = model(**inputs()).loss
    enable_chunked_loss(model, 0.3)
    assert torch.allclose(model(**inputs()).loss, plain, atol=PARITY_FP32)
    model.train()
    assert not torch.allclose(model(**inputs()).loss, plain, atol=100 * PARITY_FP32)


def test_calls_without_labels_are_what_they_were() -> None:
    model = small_model("gpt2", bos_token_id=0, eos_token_id=0).requires_grad_(False)
    ids = token_ids()
    logits = model(input_ids=ids).logits
    names = set(inspect.signature(model.forward).parameters)
    enable_chunked_loss(model)
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert set(inspect.signature(model.forward).parameters) == names, "the Trainer keeps columns by these names"


def test_what_has_no_plain_head_is_left_alone() -> None:
    assert not enable_chunked_loss(small_model("gpt2", 2))
    assert not enable_chunked_loss(small_model("roberta", 2))


def test_a_head_that_is_trained_keeps_its_gradient() -> None:
    """Full fine-tuning: the head's weight, tied to the embedding, learns from both of its uses."""
    found = []
    for spared in (False, True):
        model = small_model("gpt2")
        if spared:
            enable_optimizations(model)
        model(**inputs()).loss.backward()
        found.append(model.get_input_embeddings().weight.grad)
    assert torch.allclose(found[1], found[0], atol=PARITY_FP32)


def test_a_head_that_is_unfrozen_later_is_refused() -> None:
    model = small_model("gpt2").requires_grad_(False)
    assert enable_chunked_loss(model)
    model.requires_grad_(True)
    with pytest.raises(TrainingError, match="head was frozen when its loss was set up"):
        model(**inputs())


def test_the_loss_that_balances_experts_stays() -> None:
    model = small_model("qwen2_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    inject(model, LoraConfig(r=2, targets=("q",)))
    batch = inputs()
    before = model.eval()(**batch).loss
    assert not enable_optimizations(model).scores_labels_only
    torch.testing.assert_close(model(**batch).loss, before)
