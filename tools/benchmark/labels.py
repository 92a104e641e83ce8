"""Scores of classifiers against PEFT with the Trainer: the same rows, seed and initial weights.

    python -m tools.benchmark.labels --model DIR --data-dir DIR --output docs/results/kinds/labels.json

The scores of both sides are scikit-learn's and scipy's, computed here from the logits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.atomic_io import write_json_atomic
from lora_hf.core.config.schema import LoraConfig, ModelConfig, OutputConfig, RunConfig, TaskConfig, TrainConfig
from lora_hf.core.formatting import percent
from lora_hf.core.provenance import machine, versions
from lora_hf.core.records import read_json_record
from lora_hf.data.metrics.multi_label import choose_thresholds
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.classification import TextClassification
from lora_hf.data.tasks.registry import task_of
from lora_hf.inference.classify import Predictor
from lora_hf.models.load import load_base, load_tokenizer
from lora_hf.training.regression_head import center_new_head
from lora_hf.training.run import Run, prepare_model, train
from tools.benchmark.label_rows import label_rows

EPOCHS = {"sst2": 1, "stsb": 3, "topics": 3}
LEARNING_RATES = {"sst2": 2e-3, "stsb": 5e-4, "topics": 2e-3}  # with 2e-3, stsb diverges on both sides


def config_of(name: str, model: str, data_dir: str, folder: Path, train_rows: int | None = None) -> RunConfig:
    """The run of a task: `sst2`, `stsb` or `topics`, whose rows with several labels are written to `folder`."""
    task = TaskConfig(name, data_dir=data_dir, max_length=48, train_rows=train_rows or 2000)
    if name == "topics":
        rows = "".join(f"{json.dumps(row)}\n" for row in label_rows((train_rows or 800) * 5 // 4))
        (folder / "train.jsonl").write_text(rows, encoding="utf-8")
        task = TaskConfig(name, str(folder), 48, kind="multi_label", validation=0.2)
    return RunConfig(
        model=ModelConfig(model, precision="fp32", dropout=0.0),  # the sides would draw other masks
        task=task,
        lora=LoraConfig(r=8, lora_alpha=16, targets=("attention",)),
        train=TrainConfig(epochs=EPOCHS[name], lr=LEARNING_RATES[name], batch_size=16),
        output=OutputConfig(str(folder), "ours", overwrite=True),
    )


@dataclass(frozen=True)
class Compared:
    """Both sides after training on the same rows, and their logits for the validation rows."""

    run: Run
    validation: Dataset
    ours: np.ndarray
    peft: np.ndarray


def train_both(config: RunConfig, validation_rows: int | None = None) -> Compared:
    """Trains lora_hf and PEFT; `validation_rows` leaves out the validation rows after the first ones."""
    task = task_of(config.task)
    assert isinstance(task, TextClassification)
    rows = dict(task.load(config.task.data_dir, task.splits))
    if validation_rows is not None:
        rows["validation"] = rows["validation"].select(range(validation_rows))
    run = train(config, rows=rows)
    validation = rows["validation"]
    texts = {column: list(validation[column]) for column in task.text_columns}
    logits = Predictor.load(find_saved_model(run.weights)).logits(texts)
    return Compared(run, validation, logits, _peft_logits(config, task, rows))


def compare_with_peft(config: RunConfig) -> dict[str, Any]:
    """Trains both sides, and returns their scores and the task's own scores of our logits."""
    both, task = train_both(config), task_of(config.task)
    assert isinstance(task, TextClassification)
    from_zero = {}
    if task.problem_type == "regression":
        logits = _peft_logits(config, task, task.load(config.task.data_dir, task.splits), from_mean=False)
        from_zero = {"peft_from_zero": scores(task, logits, both.validation)}
    return {
        "task": task.name,
        "rows": both.run.record.rows,
        "config": both.run.record.config,
        "recorded": both.run.record.metrics["validation"],
        "ours": scores(task, both.ours, both.validation),
        "peft": scores(task, both.peft, both.validation),
        **from_zero,
    }


def scores(task: Task, logits: np.ndarray, rows: Dataset) -> dict[str, float]:
    """The scores of the logits for the rows, without any code of lora_hf but the choice of thresholds."""
    labels = np.array(rows["label"][:])
    if task.problem_type == "regression":
        given = logits.reshape(-1)
        found: dict[str, Any] = {"pearson": pearsonr(given, labels), "spearmanr": spearmanr(given, labels)}
        return {name: float(result.statistic) for name, result in found.items()}
    if task.problem_type == "single_label_classification":
        return {"accuracy": float(accuracy_score(labels, logits.argmax(1)))}
    given = 1 / (1 + np.exp(-logits.astype(np.float64)))
    predicted = given >= np.array(choose_thresholds(labels, given))
    return {
        "micro_f1": float(f1_score(labels, predicted, average="micro")),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "mean_average_precision": float(average_precision_score(labels, given)),
    }


def _peft_logits(
    config: RunConfig, task: TextClassification, rows: Mapping[str, Dataset], from_mean: bool = True
) -> np.ndarray:
    """The logits of the validation rows after training with PEFT and the Trainer, from the weights ours starts with.

    Args:
        from_mean: whether the head of a regression starts at the mean of the labels, as ours, or at zero, as PEFT's.
    """
    import peft

    tokenizer = load_tokenizer(config.model)
    encoded = {
        split: Dataset.from_dict(task.encode(part[:], tokenizer, config.task.max_length))  # type: ignore[arg-type]
        for split, part in rows.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        ours, _ = prepare_model(config, task)
        if from_mean:
            center_new_head(ours, task, encoded["train"])
        start = save_adapter(ours, Path(folder) / "start")
        base = load_base(config.model, task, config.train.seed)
        model = peft.PeftModel.from_pretrained(base, str(start), is_trainable=True)
        set_seed(config.train.seed)
        arguments = TrainingArguments(
            folder,
            num_train_epochs=config.train.epochs,
            learning_rate=config.train.lr,
            per_device_train_batch_size=config.train.batch_size,
            per_device_eval_batch_size=config.train.eval_batch_size,
            warmup_steps=config.train.warmup_ratio,
            seed=config.train.seed,
            data_seed=config.train.seed,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model=task.best_metric,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model,
            arguments,
            DataCollatorWithPadding(tokenizer),
            encoded["train"],
            encoded["validation"],
            compute_metrics=lambda outcome: task.score(outcome.predictions, outcome.label_ids),
        )
        trainer.train()
        return np.asarray(trainer.predict(encoded["validation"]).predictions)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.labels", description=(__doc__ or "").splitlines()[0]
    )
    for option in ("--model", "--data-dir", "--output"):
        parser.add_argument(option, required=True)
    parser.add_argument("--tasks", nargs="*", default=list(EPOCHS), help="the output keeps its results of the others")
    options = parser.parse_args()
    output = Path(options.output)
    results = read_json_record(output)["compared"] if output.is_file() else []
    compared = {found["task"]: found for found in results}
    for name in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            found = compare_with_peft(config_of(name, options.model, options.data_dir, Path(folder)))
        found["config"] = portable(found["config"], Path(options.model).name)
        compared[name] = found
        print(name, *(f"{key} {percent(found['ours'][key])} {percent(value)}" for key, value in found["peft"].items()))
    record = {"compared": list(compared.values()), "versions": versions(), "machine": machine()}
    write_json_atomic(output, record)


def portable(config: dict[str, Any], model: str) -> dict[str, Any]:
    """The config without the folders of this machine."""
    sections = RunConfig.from_dict(config)
    changed = replace(
        sections,
        model=replace(sections.model, name=model),
        task=replace(sections.task, data_dir=None),
        output=OutputConfig(),
    )
    return changed.to_dict()


if __name__ == "__main__":
    main()
