"""One run, from a config to a folder with the adapter, the scores and the record."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from lora_hf.adapters.fit import check_tokenizer
from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.save_load import copy_lora_weights, save_adapter
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.provenance import Moment, folder_size, git_state, machine, versions
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, RunRecord, peak_memory
from lora_hf.data.overview import DataOverview, describe_data
from lora_hf.data.sampling import number_prompts
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.chat import self_contained
from lora_hf.data.tasks.label_names import infer_label_names
from lora_hf.data.tasks.registry import task_of
from lora_hf.data.tokenization import digest_of, encode
from lora_hf.lora.fingerprint import fingerprint
from lora_hf.lora.inject import count_parameters, inject_at, inject_head
from lora_hf.lora.precision import flush_denormals, resolve_precision
from lora_hf.lora.target_modules import Site, plan
from lora_hf.models.align import align_tokenizer, check_tokens
from lora_hf.models.load import load_base, load_tokenizer
from lora_hf.models.tokenizer_identity import tokenizer_identity
from lora_hf.training.arguments import explain_argument_errors, training_arguments
from lora_hf.training.batches import EVALUATION_OUTPUTS, padding_collator
from lora_hf.training.callbacks import (
    CheckpointCallback,
    EvaluationStoppedError,
    LogFile,
    RunLines,
    SignalHandler,
    TrainingGuard,
    install_callbacks,
)
from lora_hf.training.checkpoints import (
    check_data,
    read_progress,
    translate_disk_full,
    translate_lost_process,
)
from lora_hf.training.classifier_loss import configured_loss
from lora_hf.training.distributed import (
    DEFAULT_TIMEOUT,
    barrier,
    configure_fsdp,
    init_processes,
    rank,
    run_on_rank,
)
from lora_hf.training.estimate import Estimator
from lora_hf.training.regression_head import center_new_head
from lora_hf.training.results import draw_run, record_training, score_outputs
from lora_hf.training.run_dir import (
    LOG_FILE,
    begin_run,
    check_shared_folder,
    find_run_folder,
    run_lock,
    run_state,
    save_thresholds,
    weights_folder,
)
from lora_hf.training.trainer import (
    AdapterTrainer,
    RunTrainer,
    enable_optimizations,
)
from lora_hf.training.validation import check_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its record."""

    folder: Path
    record: RunRecord

    @property
    def weights(self) -> Path:
        """The folder of the adapter, or of the whole model after full fine-tuning."""
        return self.folder / weights_folder(self.record.method)


@dataclass
class PreparedRun:
    """A run that is ready to train."""

    config: RunConfig
    task: Task
    folder: Path
    rows: Mapping[str, Dataset]
    encoded: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    model: Any
    trainer: RunTrainer
    record: RunRecord
    data: DataOverview
    estimator: Estimator
    log_prefix: str
    started: Moment


@flush_denormals()
def train(
    config: RunConfig,
    resume: str | None = None,
    rows: Mapping[str, Dataset] | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
) -> Run:
    """Fine-tunes a model as the config says, and writes the run folder.

    If several processes call this together (`training.distributed`), each trains on its own rows, `train.batch_size` of
    them per step. Rank 0 writes the files, and all processes return the same run.

    Args:
        resume: a checkpoint folder, or `auto`: the newest checkpoint of the newest unfinished run with exactly this
            config or, if there is none, of a finished run with fewer epochs or steps.
        rows: the task's splits, if they are already loaded.
        callbacks: further callbacks for the Trainer; None prints a line on standard error for each evaluation.

    Raises:
        UserError: the config, data, model or adapter cannot be used. Nothing has been trained.
        TrainingError: there is nothing to train, training changes nothing, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM. All finished steps are saved.
    """
    started = Moment.now()
    config, folder, checkpoint = find_run(config, resume)
    before = run_state(folder)
    handler = SignalHandler(folder)
    with translate_disk_full(folder), translate_lost_process(folder), handler, run_lock(folder) as lock:
        task = task_of(config.task)
        rows = rows or task.load(config.task.data_dir, task.splits)
        model, sites = prepare_model(config, task)
        begin = partial(begin_run, config, folder, checkpoint, lock, before)
        run = prepare_run(config, folder, rows, model, sites, started, begin, callbacks, checkpoint)
        training = time.monotonic()
        metrics = _fit(run, checkpoint, handler)
        return finish_run(run, metrics, training)


def find_run(config: RunConfig, resume: str | None = None) -> tuple[RunConfig, Path, Path | None]:
    """The config with its precision resolved, the folder of the run, and the checkpoint to resume from.

    Raises:
        UserError: the config cannot be used, or another run is in the way.
    """
    check_run(config)
    hf = config.train.hf
    timeout = timedelta(seconds=hf["ddp_timeout"]) if "ddp_timeout" in hf else DEFAULT_TIMEOUT
    init_processes(bool(hf.get("use_cpu")), hf.get("ddp_backend"), timeout)
    # Probed in one process: each of them might find another precision faster.
    precision = run_on_rank(lambda: resolve_precision(config.model.precision))
    described = infer_label_names(self_contained(config.task))
    config = replace(config, model=replace(config.model, precision=precision), task=described)
    found = run_on_rank(lambda: [str(path) for path in find_run_folder(config, resume) if path is not None])
    return config, Path(found[0]), Path(found[1]) if len(found) > 1 else None


def prepare_model(config: RunConfig, task: Task) -> tuple[PreTrainedModel, list[Site]]:
    """Loads the base, adds the modules to train, initialized from the run's seed, and returns the LoRA sites too.

    Raises:
        TrainingError: nothing would be trained.
        UserError: the base cannot be loaded or adapted.
    """
    set_seed(config.train.seed)
    model_config = config.model
    if config.train.method == "full":
        # All weights are master weights here: they stay fp32, and autocast computes in the precision asked for.
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
        raise TrainingError(f"train.method={config.train.method}: this model has no parameter to train")
    return model, sites


def prepare_run(
    config: RunConfig,
    folder: Path,
    rows: Mapping[str, Dataset],
    model: PreTrainedModel,
    sites: Sequence[Site],
    started: Moment,
    begin: Callable[[], None],
    callbacks: Sequence[TrainerCallback] | None = None,
    checkpoint: Path | None = None,
) -> PreparedRun:
    """Encodes the data, and creates the run folder after the data and the model have passed all checks.

    Args:
        begin: creates the run folder.
    """
    task = task_of(config.task)
    tokenizer = task.prepare_tokenizer(load_tokenizer(config.model))
    align_tokenizer(tokenizer, model)
    if config.train.start_from:
        check_tokenizer(Path(config.train.start_from), tokenizer_identity(tokenizer))
    counts = count_parameters(model)
    encoded: dict[str, Any] = {
        split: encode(task, part, tokenizer, config.task.max_length, split) for split, part in rows.items()
    }
    for part in encoded.values():
        check_tokens(task, part.data.column("input_ids"), tokenizer, model)
    center_new_head(model, task, encoded[task.train_split])
    if config.train.method != "full":
        fingerprint(model)  # the first checkpoint needs it, and NaN in the base should not be found only then
    digests = {split: digest_of(part) for split, part in encoded.items()}
    if checkpoint is not None:
        check_data(checkpoint, digests)
    optimizations = enable_optimizations(model, config.train.label_smoothing)
    arguments = training_arguments(config, task, folder, optimizations)
    keep, arguments.save_total_limit = arguments.save_total_limit, None  # CheckpointCallback deletes old ones
    barrier()  # a problem in any process is reported before anything is written
    run_on_rank(begin)
    check_shared_folder(folder)
    with explain_argument_errors(config.train.hf):
        trainer = _new_trainer(config, task, model, tokenizer, rows, encoded, arguments)
        trainer.classifier_loss = configured_loss(task, config.train, rows[task.train_split])
    log_prefix = f"{folder.name}, " if callbacks is not None else ""  # where there are several runs
    data = describe_data(task, rows, tokenizer, config.task.max_length)
    estimator = Estimator(trainer, data, task.train_split)
    if callbacks is None:
        callbacks = [RunLines(config.model.precision, data, counts, estimator, log_prefix)]
    if rank():  # dropout differs between processes; the weights and the order of the rows are drawn already
        set_seed((config.train.seed + rank()) % 2**32)
    install_callbacks(
        trainer,
        log_prefix,
        TrainingGuard(config.train.method),
        LogFile(folder / LOG_FILE),
        CheckpointCallback(trainer, checkpoint, keep, digests),
        estimator,
        *callbacks,
    )
    record = RunRecord(
        task=task.name,
        method=config.train.method,
        model=config.model.name,
        config=config.to_dict(),
        seed=config.train.seed,
        started=started.date.isoformat(timespec="seconds"),
        parameters=asdict(counts),
        sites=[asdict(site) for site in sites],
        rows={split: len(part) for split, part in rows.items()},
        versions=versions(),
        git=git_state(),
        machine=machine() | {"threads": torch.get_num_threads(), "processes": arguments.world_size},
    )
    return PreparedRun(
        config, task, folder, rows, encoded, tokenizer, model, trainer, record, data, estimator, log_prefix, started
    )


def _new_trainer(
    config: RunConfig,
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Dataset],
    encoded: Mapping[str, Any],
    arguments: TrainingArguments,
) -> RunTrainer:
    def compute_metrics(outcome: EvalPrediction) -> dict[str, float]:
        split = trainer.evaluated if trainer.evaluated in rows else trainer.evaluated.removeprefix("eval_")
        return task.score_rows(task.row_outputs(outcome.predictions, encoded[split], rows[split]), rows[split])

    trainer_class = RunTrainer if config.train.method == "full" else AdapterTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=encoded[task.train_split],
        eval_dataset={split: encoded[split] for split in task.evaluation_splits},
        data_collator=padding_collator(model, tokenizer, task.model_kind),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=EVALUATION_OUTPUTS.get(task.model_kind),
    )
    trainer.reports_likelihoods = task.verb == "generate"
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        trainer.unsharded = configure_fsdp(model, plugin, trainer.accelerator.device)
        # What is trained is whole in each process, so from here on it is saved and loaded as without FSDP.
        trainer.is_fsdp_enabled = False
    # DDP would send all buffers in every step. None changes in training, and a packed base consists of them.
    model._ddp_params_and_buffers_to_ignore = [name for name, _ in model.named_buffers()]
    trainer.loraplus_lr_ratio = config.train.loraplus_lr_ratio
    if config.train.group_by_prompt:
        training_rows = encoded[task.train_split]
        trainer.prompts = number_prompts(training_rows["labels"], training_rows["input_ids"])
    # A classifier's forward accepts any keyword, so the Trainer assumes that it divides its loss by the number of items
    # of all accumulated batches, and does not divide itself: gradients would grow with gradient_accumulation.
    trainer.model_accepts_loss_kwargs = task.model_kind == "causal-lm"
    if config.train.patience:
        trainer.add_callback(EarlyStoppingCallback(config.train.patience))
    return trainer


def _fit(run: PreparedRun, checkpoint: Path | None, handler: SignalHandler) -> Mapping[str, float]:
    """Trains from the start or a checkpoint. Returns the Trainer's metrics, empty if training was already finished."""
    trainer = run.trainer
    trainer.add_callback(handler)  # the last one: it stops the run once the others have done their part
    with handler.training(), explain_argument_errors(run.config.train.hf, lambda: trainer.training_began):
        try:
            if checkpoint and read_progress(checkpoint).get("evaluation_due"):
                trainer.evaluate_checkpoint(checkpoint)
            if checkpoint and read_progress(checkpoint)["finished"]:
                trainer.finish_from(checkpoint)
                return {}
            return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        except EvaluationStoppedError:
            if trainer.is_in_train and trainer.state.global_step:
                trainer.save_unevaluated()
            handler.stop_if_signaled()
            raise
        except UnpicklingError as error:
            raise ConfigError(
                f"{checkpoint}: refused: its pickled state contains more than tensors. None of its code was run. "
                "Resume from another checkpoint, or start again"
            ) from error


def finish_run(run: PreparedRun, metrics: Mapping[str, float], training: float) -> Run:
    """Scores the trained model and writes the results.

    Args:
        metrics: of the Trainer.
        training: when training started.
    """
    scoring = time.monotonic()
    outputs = {}
    for split in run.task.evaluation_splits:
        predictions = run.trainer.final_outputs(split, run.encoded[split])
        outputs[split] = run.task.row_outputs(predictions, run.encoded[split], run.rows[split])
    if not rank():
        run.record.timings = {"setup": training - run.started.clock, "train": scoring - training}
        _write_results(run, metrics, outputs, scoring)
    barrier()
    return Run(run.folder, RunRecord.load(run.folder / RECORD_FILE) if rank() else run.record)


def _write_results(run: PreparedRun, metrics: Mapping[str, float], outputs: Mapping[str, Any], scoring: float) -> None:
    """Writes scores, weights, curves and, last, the record, whose presence means that the run is finished."""
    record, trainer = run.record, run.trainer
    task = score_outputs(record, run.task, outputs, run.rows, run.folder, run.log_prefix)
    save_thresholds(task, run.folder / RUN_CONFIG_FILE)
    weights = Run(run.folder, record).weights
    if record.method == "full":
        run.model.save_pretrained(weights)
        run.tokenizer.save_pretrained(weights)
    else:
        save_adapter(run.model, weights, task=run.task.name, tokenizer=run.tokenizer)
    # So that a copy of the folder still has the run's tokenizer, length, task and decoding.
    shutil.copyfile(run.folder / RUN_CONFIG_FILE, weights / RUN_CONFIG_FILE)
    record_training(record, trainer, metrics, run.log_prefix)
    now = Moment.now()
    record.timings |= {"score": now.clock - scoring, "total": now.clock - run.started.clock}
    record.timings["cpu"] = now.cpu - run.started.cpu
    if estimate := run.estimator.estimate:
        record.estimate = estimate.compared(record.timings["train"], peak_memory(record.memory))
    record.files = {weights.name: folder_size(weights)}
    if run.config.output.plots:
        draw_run(record, run.folder)
    record.save(run.folder)
