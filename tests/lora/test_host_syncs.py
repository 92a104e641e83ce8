"""A training step waits for the device nowhere.

The device is torch's meta device: it has shapes and no values, so whatever would make the host wait for a GPU
(`.item()`, `.tolist()`, `.cpu()`, `nonzero`, a mask as an index) raises an error here, also on a machine without a GPU.

What still waits, outside the plain step:

- the loss is read on every 16th step and when something is logged, evaluated or saved (`training.loss_monitor`);
- the first step's lora_B is read once (`training.callbacks.TrainingGuard`), and the tokens of the first six steps, from
  which the run's time is estimated (`training.trainer`);
- a base in fp16 reads in each step whether a gradient has overflowed (`torch.amp.GradScaler`);
- several processes agree after each step whether one has got a signal (`training.callbacks.SignalHandler`);
- a batch that `padding_collator` has not made is copied to the host, once in a step (the last test).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora import unpadding
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.host_batch import ON_HOST
from lora_hf.lora.inject import inject
from lora_hf.training.batches import padding_collator
from lora_hf.training.classifier_loss import classifier_loss
from lora_hf.training.trainer import enable_optimizations
from tests.support.small_models import CLASSIFIERS, small_model
from tests.support.word_tokenizer import word_tokenizer

META = torch.device("meta")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")  # the meta device lacks their product in fp32
UNPADDED = [kind for kind, entry in ARCHITECTURES.items() if not entry.padded_because and kind not in EXPERTS]
SHARED = [5, 6, 7, 8, 9]  # the prefix of two rows, which a causal model computes once


@pytest.fixture(autouse=True)
def _meta_has_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises an error for a device type without autocast, of which it has one for every real device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)


class Copies(TorchDispatchMode):
    """Counts the copies from the host to the device by whether they wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: Counter[bool] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and args[0].device != META and result.device == META:
            self.waiting[not kwargs.get("non_blocking")] += 1
        elif func is torch.ops.aten.copy_.default and args[1].device != META and args[0].device == META:
            self.waiting[not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))] += 1
        return result


def prepared(kind: str, heads: str, **lora: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model on the device, ready to train, and a batch as the Trainer hands it over."""
    model = inject(small_model(kind, 3 if heads == "classes" else None), LoraConfig(r=2, targets=("all",), **lora))
    assert enable_optimizations(model).padded_because is None
    rows: list[dict[str, Any]] = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in (SHARED, [4, *SHARED], [*SHARED, 3, 4])
    ]
    for number, row in enumerate(rows):
        row["labels"] = number if heads == "classes" else [-100, *row["input_ids"][1:]]
    collate = padding_collator(
        model, word_tokenizer(pad_token="<pad>"), "causal-lm" if heads == "tokens" else "sequence-classification"
    )
    return model.train().to(META), send_to_device(dict(collate(rows)), META, non_blocking=True)


def train_one_step(model: PreTrainedModel, batch: dict[str, Any], heads: str) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    if heads == "classes":
        labels = batch.pop("labels")
        loss = classifier_loss(model(**batch).logits, labels, "single_label_classification")
    else:
        loss = model(**batch, num_items_in_batch=torch.tensor(10, device=META)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    assert all(parameter.grad is not None for parameter in trained if "pooler" not in str(parameter.shape))


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.1}], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        pytest.param(kind, heads, marks=[] if kind in ("bert", "gpt2", "llama") else pytest.mark.full)
        for kind in UNPADDED
        for heads in ("classes", "tokens")
        if (kind in CLASSIFIERS if heads == "classes" else ARCHITECTURES[kind].causal)
    ],
)
def test_a_training_step_never_waits_for_the_device(kind: str, heads: str, lora: dict[str, Any]) -> None:
    model, batch = prepared(kind, heads, **lora)
    with Copies() as copies:
        train_one_step(model, batch, heads)
    assert copies.waiting[False] >= 2, "the layout is copied"
    assert not copies.waiting[True], "a copy from memory that is not pinned waits for all steps before it"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_device_is_noticed_where_it_would_wait(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = prepared(kind, "classes")
    del batch[ON_HOST]
    with pytest.raises(NotImplementedError, match="meta tensor"):
        model(**batch)


def test_a_batch_of_another_collator_is_copied_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def recorded(self: Any, name: str, device_tensor: torch.Tensor) -> torch.Tensor:
        copied.append(name)
        return device_tensor.cpu()

    monkeypatch.setattr(unpadding.HostBatch, "get", recorded)
    model = small_model("bert", 3)
    unpadding.enable_unpadding(model)
    model(input_ids=torch.ones(2, 4, dtype=torch.long), attention_mask=torch.ones(2, 4, dtype=torch.long))
    assert copied == ["attention_mask"]


def test_a_kept_copy_of_another_batch_is_not_used() -> None:
    kept = unpadding.HostBatch({"attention_mask": torch.ones(3, 4)})
    own = torch.zeros(2, 4)
    assert kept.get("attention_mask", own) is own
