"""The names by which transformers, peft and their example scripts call the keys of a config."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_hf.core.errors import did_you_mean

# Fields of transformers.TrainingArguments that have a key of their own here.
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

# Each for the key that people mean by it, wherever they put it.
KEY_ALIASES = {
    **OWN_KEYS,
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

# The last part of a module's path, as target_modules of peft holds it, for the role or the preset that means it.
ROLE_ALIASES = {
    "query": "q",
    "query_proj": "q",
    "q_proj": "q",
    "q_lin": "q",
    "key": "k",
    "key_proj": "k",
    "k_proj": "k",
    "k_lin": "k",
    "value": "v",
    "value_proj": "v",
    "v_proj": "v",
    "v_lin": "v",
    "o_proj": "o",
    "out_proj": "o",
    "out_lin": "o",
    "c_attn": "q, k, v",
    "query_key_value": "q, k, v",
    "up_proj": "ffn_up",
    "c_fc": "ffn_up",
    "fc1": "ffn_up",
    "lin1": "ffn_up",
    "gate_proj": "ffn_gate",
    "down_proj": "ffn_down",
    "fc2": "ffn_down",
    "lin2": "ffn_down",
    "all-linear": "all",
}


def find_keys(word: str, known: Mapping[str, Collection[str]]) -> list[str]:
    """The keys, as `section.key`, that `word` means here, in transformers or in peft.

    Args:
        known: the keys of each section.
    """
    found = [f"{section}.{word}" for section, keys in known.items() if word in keys]
    return list(dict.fromkeys([*found, *([KEY_ALIASES[word]] if word in KEY_ALIASES else [])]))


def hint_for_key(section: str, key: str, known: Mapping[str, Collection[str]]) -> str:
    """A suggestion for an unknown key of a section: our name for the same thing, else the nearest name."""
    meant = find_keys(key, known)
    here = [full.partition(".")[2] for full in meant if full.startswith(f"{section}.")]
    if meant:
        return f" (did you mean {' or '.join(map(repr, here or meant))}?)"
    near = did_you_mean(key, known[section])
    return near if near or section != "train" else "; fields of transformers.TrainingArguments go under train.hf"
