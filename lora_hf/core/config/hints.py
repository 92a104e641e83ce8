"""Hints for unknown keys: the names that transformers, peft, their example scripts, axolotl and LLaMA-Factory use."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_hf.core.errors import did_you_mean

# Fields of transformers.TrainingArguments that have their own key here, and so are refused under `train.hf`.
OWN_KEYS = {
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

# Fields of transformers.TrainingArguments that must not be set, and why.
_BEST = "the metric of the task decides which checkpoint is the best one; a custom task sets task.metric"
_PUBLISHES = "would publish the run while it trains; use push once it has ended"
_NO_EFFECT = "has no effect here"
REFUSED_FIELDS = {
    **dict.fromkeys(("greater_is_better", "metric_for_best_model", "load_best_model_at_end"), _BEST),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"), _PUBLISHES),
    "hub_always_push": _PUBLISHES,
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _NO_EFFECT),
    "resume_from_checkpoint": "use resume=auto, or resume=CHECKPOINT",
    "data_seed": "set train.seed instead",
    "auto_find_batch_size": "set train.batch_size and train.gradient_accumulation instead",
    "save_only_model": "a checkpoint without the state of the optimizer could not be resumed from",
    "prediction_loss_only": "the run could not score its predictions",
    "batch_eval_metrics": "the metrics of the tasks need all predictions at once",
    "label_names": "the task names its labels",
    "remove_unused_columns": "the rows are encoded already, and hold what the model reads",
}

# What people write in any section, or without one as in axolotl and LLaMA-Factory, by the key that they mean.
_OTHER_NAMES = {
    "train.method": ("adapter", "finetuning_type", "use_peft"),
    "train.epochs": ("num_epochs",),
    "train.batch_size": ("train_batch_size", "micro_batch_size"),
    "train.schedule": ("lr_scheduler",),
    "train.patience": ("early_stopping_patience", "early_stopping_steps"),
    "train.start_from": ("lora_model_dir", "adapter_name_or_path"),
    "train.hf.optim": ("optimizer",),
    "output.overwrite": ("overwrite_output_dir",),
    "lora.r": ("rank", "lora_r", "lora_rank"),
    "lora.lora_alpha": ("alpha",),
    "lora.lora_dropout": ("dropout",),
    "lora.targets": ("target_modules", "lora_target_modules", "lora_target_linear", "lora_target"),
    "lora.layers": ("layers_to_transform", "lora_layers_to_transform", "peft_layers_to_transform"),
    "lora.modules_to_save": ("lora_modules_to_save", "additional_target"),
    "lora.use_dora": ("peft_use_dora",),
    "lora.use_rslora": ("peft_use_rslora",),
    "lora.init_lora_weights": ("peft_init_lora_weights", "pissa_init"),
    "model.name": ("model_name", "model_name_or_path", "base_model_name_or_path", "base_model"),
    "model.revision": ("model_revision", "revision_of_model"),
    "model.tokenizer": ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_config"),
    "model.precision": ("dtype", "torch_dtype", "bf16", "fp16"),
    "model.quantised": ("load_in_4bit", "load_in_8bit", "quantization_bit"),
    "task.name": ("task_name", "dataset_name", "dataset"),
    "task.kind": ("stage",),
    "task.data_dir": ("datasets", "dataset_dir"),
    "task.max_length": ("max_seq_length", "sequence_len", "cutoff_len"),
    "task.train_rows": ("max_samples", "max_train_samples"),
    "task.validation": ("val_set_size", "val_size"),
    "task.train_on": ("train_on_inputs", "train_on_prompt", "mask_history"),
    "task.chat_template": ("template",),
}
_TRAINER_ARGUMENTS = ("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing", "logging_steps", "optim",
                      "report_to", "save_steps", "save_total_limit", "torch_compile")  # fmt: skip
KEY_ALIASES = {
    **OWN_KEYS,
    **{name: f"train.hf.{name}" for name in _TRAINER_ARGUMENTS},
    **{name: key for key, names in _OTHER_NAMES.items() for name in names},
}


def find_keys(word: str, known: Mapping[str, Collection[str]]) -> list[str]:
    """Returns the keys, as `section.key`, that `word` names here or in transformers and peft.

    Args:
        known: the keys of each section.
    """
    keys = [f"{section}.{word}" for section, names in known.items() if word in names]
    if word in KEY_ALIASES:
        keys.append(KEY_ALIASES[word])
    return list(dict.fromkeys(keys))


def hint_for_section(name: str, known: Mapping[str, Collection[str]]) -> str:
    """Returns what to add to the message about an unknown section: the keys that are meant, or the nearest."""
    meant = find_keys(name, known)
    if meant:
        return f" (did you mean the key {' or '.join(map(repr, meant))}?)"
    return f"{did_you_mean(name, known)}; expected {', '.join(known)}"


def hint_for_key(section: str, key: str, known: Mapping[str, Collection[str]]) -> str:
    """Returns what to add to the message about an unknown key of a section: the key that is meant, else the nearest."""
    meant = find_keys(key, known)
    in_section = [name.removeprefix(f"{section}.") for name in meant if name.rpartition(".")[0] == section]
    if meant:
        return f" (did you mean {' or '.join(map(repr, in_section or meant))}?)"
    trainer = "; fields of transformers.TrainingArguments go under train.hf" if section == "train" else ""
    return did_you_mean(key, known[section]) + trainer
