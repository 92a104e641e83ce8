"""The names by which transformers, peft and their example scripts call the keys of a config."""

from __future__ import annotations

# Fields of transformers.TrainingArguments that have a key of their own here.
OURS = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "weight_decay": "train.weight_decay",
    "warmup_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_ratio",
    "lr_scheduler_type": "train.schedule",
    "max_grad_norm": "train.max_grad_norm",
    "label_smoothing_factor": "train.label_smoothing",
    "seed": "train.seed",
    "output_dir": "output.dir",
}

# Each for the key that people mean by it, wherever they put it.
OTHER_NAMES = {
    **OURS,
    "train_batch_size": "train.batch_size",
    "early_stopping_patience": "train.patience",
    "overwrite_output_dir": "output.overwrite",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "target_modules": "lora.targets",
    "layers_to_transform": "lora.layers",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "base_model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "tokenizer_name": "model.tokenizer",
    "dtype": "model.precision",
    "torch_dtype": "model.precision",
    "bf16": "model.precision",
    "fp16": "model.precision",
    "load_in_4bit": "model.quantised",
    "load_in_8bit": "model.quantised",
    "task_name": "task.name",
    "dataset_name": "task.name",
    "max_seq_length": "task.max_length",
}
