"""The training sides of this library, each a Trainer that is ready to run. `peers` has those of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from lora_hf.core.config.schema import RunConfig
from lora_hf.data.sampling import number_prompts
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.heads import head_paths
from lora_hf.lora.inject import inject, inject_head
from lora_hf.lora.precision import Precision
from lora_hf.models.load import load_base, load_tokenizer
from lora_hf.training.trainer import AdapterTrainer, enable_optimizations
from tools.benchmark.job import Job

Build = Callable[["Setup"], Trainer]


@dataclass(frozen=True)
class Setup:
    """What all sides share: config, rows, tokenizer and arguments of the Trainer."""

    config: RunConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    rounds: int
    folder: Path
    fastest: Precision

    @classmethod
    def from_job(cls, job: Job, folder: Path) -> Setup:
        config = RunConfig.from_dict(job.config, "benchmark")
        task, tokenizer = get_task(config.task.name), load_tokenizer(config.model)
        return cls(config, task, tokenizer, Dataset.from_list(job.rows), job.rounds, folder, job.fastest)  # type: ignore[arg-type]

    def base(self) -> PreTrainedModel:
        """The base model as lora_hf loads it, with faster activations."""
        return load_base(self.config.model, self.task, self.config.train.seed)

    def plain_base(self, precision: Precision) -> PreTrainedModel:
        """The same weights in the model that transformers builds, with its own activations."""
        ours = load_base(replace(self.config.model, precision=precision), self.task, self.config.train.seed)
        auto: Any = AutoModelForCausalLM if self.task.model_kind == "causal-lm" else AutoModelForSequenceClassification
        plain = auto.from_config(ours.config, dtype=ours.dtype)
        plain.load_state_dict(ours.state_dict())
        return plain

    def meta_base(self) -> PreTrainedModel:
        """The base model on the meta device, to count its weights before an adapter adds its own."""
        with torch.device("meta"):
            return load_base(replace(self.config.model, init="random", quantised=None), self.task)

    def arguments(self, **more: Any) -> TrainingArguments:
        """The defaults of the Trainer without logs, evaluation and checkpoints. Each epoch is a round."""
        train = self.config.train
        values: dict[str, Any] = {
            "output_dir": str(self.folder),
            "num_train_epochs": self.rounds,
            "per_device_train_batch_size": train.batch_size,
            "learning_rate": train.lr,
            "weight_decay": train.weight_decay,
            "seed": train.seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "use_cpu": not torch.cuda.is_available(),
        }
        return TrainingArguments(**(values | more))

    def trainer(self, model: Any, kind: type[Trainer] = Trainer, **more: Any) -> Trainer:
        """A Trainer that pads to the longest row of a batch. `more` are TrainingArguments."""
        generates = self.task.model_kind == "causal-lm"
        return kind(
            model=model,
            args=self.arguments(**more),
            train_dataset=self.rows,
            data_collator=(DataCollatorForSeq2Seq if generates else DataCollatorWithPadding)(self.tokenizer),
        )


def _lora(setup: Setup) -> Trainer:
    return our_trainer(setup, inject(setup.base(), setup.config.lora))


def _without_dropout(setup: Setup) -> Trainer:
    return our_trainer(setup, inject(setup.base(), replace(setup.config.lora, lora_dropout=0.0)))


def _frozen(setup: Setup) -> Trainer:
    """The upper bound for `lora`: no adapter, and the gradient goes down to the embeddings."""
    model = setup.base().requires_grad_(False)
    if head_paths(model):
        inject_head(model)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return our_trainer(setup, model)


def _head(setup: Setup) -> Trainer:
    return our_trainer(setup, inject_head(setup.base()))


def our_trainer(setup: Setup, model: PreTrainedModel) -> Trainer:
    """Trains `model` as `lora_hf.training.run` does by default."""
    arguments = enable_optimizations(model).training_arguments()
    trainer: Any = setup.trainer(model, AdapterTrainer, logging_nan_inf_filter=False, **arguments)
    trainer.model_accepts_loss_kwargs = setup.task.model_kind == "causal-lm"
    if setup.config.train.group_by_prompt:
        trainer.prompts = number_prompts(setup.rows["labels"], setup.rows["input_ids"])
    return trainer


def _full(setup: Setup) -> Trainer:
    """Trains every parameter, held in fp32 and multiplied by autocast in bf16 where that is faster."""
    bf16 = setup.fastest == "bf16"
    return setup.trainer(setup.plain_base("fp32"), bf16=bf16, train_sampling_strategy="group_by_length")


# FLOPs of a step for each weight of the base, see `step_flops`. Other sides have 4.
FLOPS_PER_WEIGHT = {"full": 6, "head": 2}
SIDES: dict[str, Build] = {
    "lora": _lora,
    "frozen": _frozen,
    "without-dropout": _without_dropout,
    "head": _head,
    "full": _full,
}
