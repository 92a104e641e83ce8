"""From a config to a finished run: data, model, LoRA, Trainer, scores, and the record of it all."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers import TrainingArguments as HFArguments

from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.save_load import copy_lora_weights, save_adapter
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.provenance import folder_size, git_state, machine, peak_rss, versions
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, RunRecord
from lora_hf.data.sampling import number_prompts
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.registry import task_of
from lora_hf.data.tokenization import encode
from lora_hf.lora.inject import count_parameters, inject_at, inject_head
from lora_hf.lora.precision import flush_denormals, resolve_precision
from lora_hf.lora.target_modules import Site, plan
from lora_hf.models.load import load_base, load_tokenizer
from lora_hf.training.callbacks import EvaluationLines, LogFile, SignalHandler, TrainingGuard, install_callbacks
from lora_hf.training.checkpoints import translate_disk_full, translate_lost_process
from lora_hf.training.distributed import (
    DEFAULT_TIMEOUT,
    all_reduce_max,
    barrier,
    init_processes,
    rank,
    run_on_rank,
    world_size,
)
from lora_hf.training.results import draw_curves, score_answers
from lora_hf.training.run_dir import LOG_FILE, begin_run, find_run_folder
from lora_hf.training.trainer import (
    AdapterTrainer,
    RunTrainer,
    SharedModel,
    completion_loss,
    cuda_peak,
    enable_optimizations,
)
from lora_hf.training.validation import check_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run: where it is and what it measured."""

    folder: Path
    record: RunRecord

    @property
    def weights(self) -> Path:
        """The adapter, or the whole model where every parameter was trained."""
        return self.folder / ("model" if self.record.method == "full" else "adapter")


@flush_denormals()
def train(
    config: RunConfig,
    resume: str | None = None,
    rows: Mapping[str, Dataset] | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    shared: SharedModel | None = None,
) -> Run:
    """Fine-tunes as the config says and writes the run folder.

    Of several processes that call it together (`lora_hf/training/distributed.py`) each trains on rows of its own,
    `train.batch_size` of them in a step; the first writes, and all return the same run.

    Args:
        resume: a checkpoint folder, or `auto`: the newest checkpoint of the newest unfinished run of this very config.
        rows: the task's splits, where they have been read already.
        callbacks: of the Trainer, beside the run's own; without: a line on standard error for each evaluation.
        shared: the model that this run trains its adapter on together with others (`joint`).

    Raises:
        UserError: whatever of the config, data, model or adapter cannot be used, before anything is trained.
        TrainingError: nothing to train, a run that does not train, or a disk that is full.
        Interrupted: Ctrl-C or SIGTERM, after the step was finished and saved.
    """
    started = time.time()
    check_run(config)
    hf = config.train.hf
    waiting = timedelta(seconds=hf["ddp_timeout"]) if "ddp_timeout" in hf else DEFAULT_TIMEOUT
    init_processes(bool(hf.get("use_cpu")), hf.get("ddp_backend"), waiting)
    # Probed in one process: each of them might find another precision faster.
    precision = run_on_rank(lambda: resolve_precision(config.model.precision))
    config = replace(config, model=replace(config.model, precision=precision))
    task = task_of(config.task)
    found = run_on_rank(lambda: [str(path) for path in find_run_folder(config, resume) if path is not None])
    folder, checkpoint = Path(found[0]), Path(found[1]) if len(found) > 1 else None
    with translate_disk_full(folder), translate_lost_process(folder):
        return _train(config, task, folder, checkpoint, rows, callbacks, shared, started)


def _train(
    config: RunConfig,
    task: Task,
    folder: Path,
    checkpoint: Path | None,
    rows: Mapping[str, Dataset] | None,
    callbacks: Sequence[TrainerCallback] | None,
    shared: SharedModel | None,
    started: float,
) -> Run:
    set_seed(config.train.seed)
    rows = rows or task.load(config.task.data_dir, task.splits)
    tokenizer = load_tokenizer(config.model)
    model, sites = prepare_model(config, task)
    counts = count_parameters(model)
    if shared:
        model = shared.attach(model)
    encoded: dict[str, Any] = {
        split: encode(task, part, tokenizer, config.task.max_length) for split, part in rows.items()
    }
    arguments = _arguments(config, task, folder, enable_optimizations(model, config.train.label_smoothing))
    barrier()  # what another cannot use is told before anything is written
    run_on_rank(lambda: begin_run(config, folder, checkpoint))
    _check_shared(folder)
    trainer = _trainer(config, task, model, tokenizer, encoded, arguments)
    if shared:
        trainer.shared, trainer.adapter = shared, shared.name
    # Of a run that is not the only one each line says which it is.
    of = f"{folder.name}, " if shared or callbacks is not None else ""
    if callbacks is None:
        callbacks = [EvaluationLines(config.model.precision, of)]
    if rank():  # each has dropout of its own; the model and the order of the rows are drawn already, or from the seed
        set_seed((config.train.seed + rank()) % 2**32)
    interruption = SignalHandler(folder)
    install_callbacks(
        trainer, of, TrainingGuard(config.train.method), LogFile(folder / LOG_FILE), *callbacks, interruption
    )
    record = RunRecord(
        task=task.name,
        method=config.train.method,
        model=config.model.name,
        config=config.to_dict(),
        seed=config.train.seed,
        started=datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        parameters=asdict(counts),
        sites=[asdict(site) for site in sites],
        rows={split: len(part) for split, part in rows.items()},
        versions=versions(),
        git=git_state(),
        machine=machine()
        | {"threads": shared.threads if shared else torch.get_num_threads(), "processes": arguments.world_size},
        together=shared.runs if shared else 1,
    )
    training = time.time()
    with interruption:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    scoring = time.time()
    answers = _answers(task, trainer, encoded)
    if rank():
        barrier()
        return Run(folder, RunRecord.load(folder / RECORD_FILE))
    score_answers(record, task, answers, rows, folder, of)
    run = Run(folder, record)
    if config.train.method == "full":
        model.save_pretrained(run.weights)
        tokenizer.save_pretrained(run.weights)
    else:
        save_adapter(model, run.weights, shared.name if shared else "default", task.name)

    state, skipped = trainer.state, trainer.overflow.skipped
    if skipped:
        record.warnings.append(f"{skipped} of {state.global_step} steps were left out: a gradient was beyond fp16")
        logger.warning("%s%s", of, record.warnings[-1])
    record.skipped_steps = skipped
    record.history = state.log_history
    record.best = {
        "metric": trainer.args.metric_for_best_model,
        "value": state.best_metric,
        "step": state.best_global_step,
    }
    record.timings = {
        "setup": training - started,
        "train": scoring - training,
        "score": time.time() - scoring,
        "total": time.time() - started,
    }
    record.throughput = {key: outcome.metrics[f"train_{key}_per_second"] for key in ("samples", "steps")}
    record.memory = {"rss": peak_rss(), "cuda": cuda_peak()}
    record.files = {run.weights.name: folder_size(run.weights)}
    draw_curves(record, folder / "curves.png")
    record.save(folder)
    barrier()
    return run


def prepare_model(config: RunConfig, task: Task) -> tuple[PreTrainedModel, list[Site]]:
    """The base with what the run trains on it, drawn from the run's seed, and where its LoRA layers are.

    Raises:
        TrainingError: nothing would be trained.
        UserError: the base cannot be loaded or adapted so.
    """
    model_config = config.model
    if config.train.method == "full":
        # All weights are masters here: they stay fp32, and autocast computes in the precision asked for.
        model_config = replace(model_config, precision="fp32")
    model = load_base(model_config, task, config.train.seed)
    sites = []
    if config.train.method == "lora":
        sites = plan(model, config.lora)
        if not sites:
            raise TrainingError("lora.targets matched no module: nothing would be trained")
        inject_at(model, sites, config.lora)
        if config.train.start_from:
            copy_lora_weights(model, read_adapter(config.train.start_from))
    elif config.train.method == "head":
        inject_head(model)
    if not count_parameters(model).trainable:
        raise TrainingError(f"train.method={config.train.method}: this model has no parameter that it would train")
    return model, sites


def _arguments(config: RunConfig, task: Task, folder: Path, of_model: dict[str, Any]) -> HFArguments:
    """The Trainer's own configuration, with the arguments that `enable_optimizations` names."""
    train = config.train
    reduced = config.model.precision if train.method == "full" else "fp32"
    values: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.eval_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.lr,
        "weight_decay": train.weight_decay,
        # The Trainer reads a value below 1 as a share of all steps.
        "warmup_steps": train.warmup_ratio if train.warmup_steps is None else train.warmup_steps,
        "lr_scheduler_type": train.schedule,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,  # one to go back to, should the newest be damaged
        "restore_callback_states_from_checkpoint": True,  # how long patience has lasted
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{task.evaluation_splits[0]}_{task.best_metric}",
        "greater_is_better": task.greater_is_better,
        "logging_strategy": "steps",
        "logging_steps": 0.02,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "data_seed": train.seed,
        "bf16": reduced == "bf16",
        "fp16": reduced == "fp16",
        # Without a GPU the Trainer refuses bf16, and several processes, unless it is told that the CPU is meant.
        "use_cpu": not torch.accelerator.is_available(),
    }
    try:
        arguments = HFArguments(**(values | of_model | train.hf))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train.hf: {error}") from error
    if arguments.fp16 and arguments.device.type == "cpu":
        asked = "train.hf.fp16" if train.hf.get("fp16") else f"model.precision=fp16 with train.method={train.method}"
        # Accelerate would compute in fp32 and say nothing.
        raise ConfigError(f"{asked}: needs a GPU; use bf16 or fp32 here")
    if arguments.world_size != world_size():
        raise ConfigError(
            f"expected {world_size()} processes (WORLD_SIZE), and the Trainer finds {arguments.world_size}; start them "
            "with torchrun or accelerate launch"
        )
    # A process has one GPU. The Trainer would copy the model to every other it sees and multiply the batch size.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _check_shared(folder: Path) -> None:
    """Raises ConfigError, in all processes, where one does not see the folder that the first has made."""
    if unseeing := all_reduce_max(0 if (folder / RUN_CONFIG_FILE).is_file() else rank()):
        raise ConfigError(
            f"output.dir: process {unseeing} does not see {folder}, which process 0 has made; expected a folder that "
            "all machines share"
        )


def _trainer(
    config: RunConfig,
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Mapping[str, Any],
    arguments: HFArguments,
) -> RunTrainer:
    generates = task.model_kind == "causal-lm"
    kind = RunTrainer if config.train.method == "full" else AdapterTrainer
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=encoded[task.train_split],
        eval_dataset={split: encoded[split] for split in task.evaluation_splits},
        data_collator=DataCollatorForSeq2Seq(tokenizer) if generates else DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda outcome: task.score(outcome.predictions, outcome.label_ids),
        preprocess_logits_for_metrics=completion_loss if generates else None,
    )
    # DDP would send all buffers in every step. None changes in training, and a packed base is made of them.
    model._ddp_params_and_buffers_to_ignore = [name for name, _ in model.named_buffers()]
    trainer.loraplus_lr_ratio = config.train.loraplus_lr_ratio
    if config.train.group_by_prompt:
        rows = encoded[task.train_split]
        trainer.prompts = number_prompts(rows["labels"], rows["input_ids"])
    # A classifier's forward takes any keyword, so the Trainer believes that it divides its loss by the number of items
    # of all accumulated batches, and does not divide itself: gradients would grow with gradient_accumulation.
    trainer.model_accepts_loss_kwargs = generates
    if config.train.patience:
        trainer.add_callback(EarlyStoppingCallback(config.train.patience))
    return trainer


def _answers(task: Task, trainer: Trainer, encoded: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the trained model gives for each evaluation split; every process has a part in it."""
    return {
        split: np.asarray(trainer.predict(encoded[split], metric_key_prefix=split).predictions)
        for split in task.evaluation_splits
    }
