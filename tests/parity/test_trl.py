"""SmolLM2 on conversations: the trained tokens and the loss of each step are those of TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.records import RunRecord
from lora_hf.data.tasks.registry import task_of
from lora_hf.training.run import prepare_model, train
from tests.support.chats import taught_rows, write_rows
from tests.tolerances import TRL_LOSS

pytestmark = pytest.mark.full
trl = pytest.importorskip("trl", reason="needs Python 3.11")

ROWS, STEPS, BATCH, LR = 200, 3, 2, 1e-3
# SmolLM2's own template with the marks that TRL needs.
MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS: dict[str, Any] = {"logging_steps": 1, "train_sampling_strategy": "sequential"}


def plain_loss(output: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """The mean over the trained tokens. TRL's fused head rounds it in fp32: it is 1.3e-5 off in fp64's first step."""
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / (
        num_items_in_batch
    )


def trained_by_trl(base: Path, adapter: Path, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = MARKED
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        assistant_only_loss=True,
        max_length=512,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        seed=0,
        **SETTINGS,
    )
    rows = Dataset.from_list(taught_rows(ROWS))
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        compute_loss_func=plain_loss,
    )
    trainer.train()
    return trainer


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_trains_as_trl_does(real_models: Path, tmp_path: Path) -> None:
    base = real_models / "smollm2"
    write_rows(tmp_path / "train.jsonl", taught_rows(ROWS))
    write_rows(tmp_path / "validation.jsonl", taught_rows(4, seed=1))
    config = RunConfig.from_dict(
        {
            "model": {"name": str(base), "precision": "fp32"},
            "task": {"name": "shop", "kind": "chat", "data_dir": str(tmp_path)},
            "lora": {"r": 8, "lora_alpha": 16, "targets": ["all"]},
            "train": {"max_steps": STEPS, "batch_size": BATCH, "lr": LR, "schedule": "constant", "warmup_steps": 0}
            | {"hf": SETTINGS},
            "output": {"dir": str(tmp_path), "plots": False, "name": "run"},
        }
    )
    task = task_of(config.task)
    save_adapter(prepare_model(config, task)[0], tmp_path / "start", task="shop")
    theirs = trained_by_trl(base, tmp_path / "start", tmp_path / "trl")
    rows = task.load(str(tmp_path), ["train"])["train"][:]
    encoded = task.encode(rows, AutoTokenizer.from_pretrained(base), 512)
    assert encoded["input_ids"] == theirs.train_dataset["input_ids"][:]
    assert encoded["labels"] == theirs.train_dataset["labels"][:]
    run = train(config)
    found, expected = losses(RunRecord.load(run.folder / "record.json").history), losses(theirs.state.log_history)
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, rel=0, abs=TRL_LOSS)
    assert expected[-1] < 0.9 * expected[0], "steps that change nothing would prove nothing"
