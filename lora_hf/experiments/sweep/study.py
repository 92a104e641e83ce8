"""Runs a sweep: trials until the study has enough, alone or with other processes, and their results."""

from __future__ import annotations

import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError, did_you_mean
from lora_hf.core.imports import heavy_imports
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, SweepRecord
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.registry import task_of
from lora_hf.experiments.sweep.plots import draw_importance, draw_learning_rates, draw_losses
from lora_hf.experiments.sweep.space import Space, with_values
from lora_hf.experiments.sweep.storage import (
    ERROR,
    GRACE,
    MEASURED,
    PRECISION,
    GridSampler,
    SeededSampler,
    TrialFailed,
    database_errors,
    ignore_experimental,
    is_finished,
    open_study,
    parse_url,
)
from lora_hf.training.run_dir import CURVES, LOG_FILE, weights_folder

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SAMPLERS = ("tpe", "grid")
DATABASE, BEST, BEST_CONFIG, SWEEP_RECORD = "study.db", "best", "best.yaml", "trials.json"
KEPT = (RECORD_FILE, RUN_CONFIG_FILE, LOG_FILE, CURVES)  # of every trial; the best one keeps more
POLL = 1.0  # seconds between two checks of the trials of other processes


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep runs.

    Raises:
        ConfigError: a study cannot have this name.

    Attributes:
        config: what all trials share; the folder of the study is created in `output.dir`.
        name: name of the study and of its folder.
        limit: complete, pruned, diverged or failed trials of all processes together; None for every point of a grid.
        seed: seed of the sampler.
        pruner: what stops trials early, one of `storage.PRUNERS`.
        sampler: what chooses the values: `tpe` for Optuna's TPE, or `grid` for every combination once, in their order.
        rungs: steps at which the losses of trials are compared, see `trials.PruningCallback`.
        recipe: what `best.yaml` holds besides the best values; default: `config`.
    """

    config: RunConfig
    space: Space
    name: str
    limit: int | None = None
    seed: int = 0
    pruner: str = "halving"
    sampler: str = "tpe"
    rungs: Mapping[int, int] = field(default_factory=dict)
    recipe: RunConfig | None = None

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ConfigError(f"study {self.name!r}: expected a name for a folder, without slashes")

    @cached_property
    def trials(self) -> int:
        """How many trials the study gets.

        Raises:
            ConfigError: an unknown sampler, or no such number of trials.
        """
        if self.sampler not in SAMPLERS:
            hint = did_you_mean(self.sampler, SAMPLERS)
            raise ConfigError(f"sampler: expected one of {', '.join(SAMPLERS)}, found {self.sampler!r}{hint}")
        trials = self.limit
        if self.sampler == "grid":
            points = len(self.space.grid())
            trials = points if trials is None else trials
            if trials > points:
                raise ConfigError(f"trials: the grid has {points} points, found {trials}")
        if trials is None:
            raise ConfigError("trials: expected a whole number >= 1; only a grid has a number of its own")
        if trials < 1:
            raise ConfigError(f"trials: expected a whole number >= 1, found {trials}")
        return trials

    @property
    def folder(self) -> Path:
        return Path(self.config.output.dir) / self.name

    @property
    def task(self) -> Task:
        return task_of(self.config.task)

    @property
    def maximize(self) -> bool:
        return self.task.greater_is_better

    @property
    def score(self) -> str:
        """The label of a trial's value: split and metric."""
        return f"{self.task.evaluation_splits[0]} {self.task.best_metric}"

    def definition(self) -> dict[str, Any]:
        """What all trials of the study have in common, so that their values can be compared."""
        config = self.config.to_dict()
        del config["output"]
        return {"config": config, "space": self.space.words(), "seed": self.seed}


def sweep(
    settings: SweepSettings, storage: str | None = None, rows: Mapping[str, Dataset] | None = None
) -> tuple[Path, SweepRecord]:
    """Runs trials until the study has enough, and writes the results.

    Args:
        storage: URL of a database that processes can share; default: a SQLite file in the folder.
        rows: the task's splits; by default they are loaded.

    Returns:
        The folder, which contains `best` (a link to the best trial), `best.yaml`, `trials.json` and plots, and the
        record.

    Raises:
        ConfigError: the storage cannot be used, the study has other trials, or the space has no such grid.
        TrainingError: all trials failed.
        UserError: an error in the config or the data that affects every trial.
    """
    name, folder, trials = settings.name, settings.folder, settings.trials
    url = parse_url(storage or f"sqlite:///{folder / DATABASE}")
    rows = rows or settings.task.load(settings.config.task.data_dir, settings.task.splits)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot create the folder of the study: {error.strerror}") from error
    # Before the study is read: folders that other processes create later belong to its trials.
    existing = sorted(file.parent.name for file in folder.glob(f"trial-*/{RECORD_FILE}"))
    with database_errors(url):
        grid = settings.sampler == "grid"
        sampler = GridSampler(settings.space.grid()) if grid else SeededSampler(settings.seed)
        study = open_study(url, name, sampler, settings.maximize, settings.definition(), settings.pruner)
        found = study.get_trials(deepcopy=False)
        if existing and not found:
            raise ConfigError(
                f"{folder}: contains {existing[0]} of a study that is not in the storage; choose another study name or "
                "output folder"
            )
        done = sum(map(is_finished, found))
        logger.info("study %s: %d trials, %d of them already finished", name, trials, done)
        _run_trials(settings, study, rows)
        found = study.get_trials(deepcopy=False)
    return folder, _write_results(settings, found)


def _run_trials(settings: SweepSettings, study: optuna.Study, rows: Mapping[str, Dataset]) -> None:
    """Runs trials while the study needs more, then waits for those of other processes."""
    waiting = False
    while True:
        with ignore_experimental():
            fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        running = sum(map(_is_alive, trials))
        if running + sum(map(is_finished, trials)) < settings.trials:
            waiting = False
            _run_one(settings, study, rows)
        elif running:
            if not waiting:
                message = "waiting for %d trials of other processes; a trial without a heartbeat for %d s is given up"
                logger.info(message, running, GRACE)
            waiting = True
            time.sleep(POLL)
        else:
            return


def _is_alive(trial: FrozenTrial) -> bool:
    """Whether the trial is running, as far as known.

    A process that was killed before its first heartbeat leaves a running trial without parameters.
    """
    if trial.state != TrialState.RUNNING:
        return False
    started = trial.datetime_start
    return bool(trial.params) or started is None or (datetime.now() - started).total_seconds() < GRACE


def _run_one(settings: SweepSettings, study: optuna.Study, rows: Mapping[str, Dataset]) -> None:
    with heavy_imports():
        from lora_hf.experiments.sweep import trials

    given_up = False  # by another process, while the trial was running

    def objective(trial: Trial) -> float:
        nonlocal given_up
        earlier = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
        if sum(_is_alive(other) or is_finished(other) for other in earlier) >= settings.trials:
            raise TrialFailed("another process started the last trial at the same time")
        settings.space.draw(trial)
        try:
            config = with_values(settings.config, settings.space.values(trial.params), f"trial {trial.number}")
        except ConfigError as error:  # each value alone goes with the config, so others may work
            trial.set_user_attr(ERROR, " ".join(str(error).split()))
            raise TrialFailed(str(error)) from error
        output = replace(config.output, dir=str(settings.folder), name=trial_folder(trial.number), overwrite=True)
        try:
            return trials.run_trial(trial, replace(config, output=output), settings.task, rows, settings.rungs)
        finally:
            given_up = study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING

    def finish(study: optuna.Study, trial: FrozenTrial) -> None:
        found = study.get_trials(deepcopy=False)
        best = best_trial(found, settings.maximize)
        remove_files(settings.folder, found, best)
        if trial.params:
            logger.info("%s", _summary(settings, trial, best))
        complete = [other.number for other in found if other.state == TrialState.COMPLETE]
        if complete == [trial.number] and len(trial.intermediate_values) < 2 and settings.pruner != "none":
            logger.info(
                "trials are evaluated only at their end, so none can be pruned; for more evaluations set "
                "train.epochs > 1 or "
                "'train.hf={eval_strategy: steps, eval_steps: 50, save_strategy: steps, save_steps: 50}'"
            )

    try:
        study.optimize(objective, n_trials=1, catch=(TrialFailed,), callbacks=[finish])
    except (UpdateFinishedTrialError, ValueError, AssertionError):  # which one depends on where Optuna notices
        if not given_up:
            raise
        logger.warning(
            "a trial of this process had no heartbeat for %d s, so another process marked it as interrupted", GRACE
        )
    trials.free_memory()


def _summary(settings: SweepSettings, trial: FrozenTrial, best: FrozenTrial | None) -> str:
    if trial.state == TrialState.COMPLETE:
        outcome = f"{settings.score} {trial.value:.4f}"
    elif trial.state == TrialState.PRUNED:
        measured = trial.user_attrs[MEASURED]
        scores, loss = measured["evaluations"], measured["loss"]
        reached = f"{settings.score} {scores[-1]:.4f}" if scores else f"loss {loss:.4f}"
        outcome = f"pruned at step {measured['steps']}, {reached}"
    else:
        outcome = f"{_state(trial)}: {trial.user_attrs.get(ERROR, 'run the same command again')}"
    best_so_far = f"; best so far {best.value:.4f}, trial {best.number}" if best else ""
    return f"trial {trial.number}: {typed(settings.space.values(trial.params))}: {outcome}{best_so_far}"


def typed(values: Mapping[str, Any]) -> str:
    """Keys and values as overrides on the command line, floats with four digits."""
    words = []
    for key, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else yaml.safe_dump(value, default_flow_style=True)
        words.append(f"{key}={text.removesuffix('...' + chr(10)).strip()}")
    return " ".join(words)


def _write_results(settings: SweepSettings, trials: Sequence[FrozenTrial]) -> SweepRecord:
    """Writes record, plots and the best config; other processes may write the same files at the same time.

    Raises:
        TrainingError: no trial is complete.
    """
    started = [trial for trial in trials if trial.params]
    best = best_trial(started, settings.maximize)
    record = SweepRecord(
        study=settings.name,
        task=settings.task.name,
        split=settings.task.evaluation_splits[0],
        metric=settings.task.best_metric,
        greater_is_better=settings.maximize,
        **settings.definition(),
        trials=[_trial_entry(settings, trial) for trial in started],
        best=_trial_entry(settings, best) if best else {},
        versions=versions() | {"optuna": optuna.__version__},
        git=git_state(),
        machine=machine(),
        pruner=settings.pruner,
    )
    with tempfile.TemporaryDirectory(prefix=".results-", dir=settings.folder) as name:
        partial = Path(name)
        if not settings.rungs:
            record.importance = draw_importance(started, settings.space, settings.maximize, settings.score, partial)
        draw_learning_rates(record, partial / "learning-rate.png")
        draw_losses(record, settings.folder, partial / "losses.png")
        record.write(partial / SWEEP_RECORD)
        if best:
            (partial / BEST).symlink_to(trial_folder(best.number))
            (partial / BEST_CONFIG).write_text(_best_config(settings, best), encoding="utf-8")
        for file in partial.iterdir():
            file.replace(settings.folder / file.name)
    if best is None:
        errors = [trial["error"] for trial in record.trials if "error" in trial]
        reason = f"all {len(errors)} trials failed; the first error: {errors[0]}" if errors else "no trial is complete"
        raise TrainingError(reason)
    return record


def _state(trial: FrozenTrial) -> str:
    if trial.state != TrialState.FAIL:
        return trial.state.name.lower()
    if not is_finished(trial):
        return "interrupted"
    return "diverged" if trial.user_attrs.get(MEASURED, {}).get("diverged") else "failed"


def _trial_entry(settings: SweepSettings, trial: FrozenTrial) -> dict[str, Any]:
    complete = trial.state == TrialState.COMPLETE
    measured = trial.user_attrs.get(MEASURED, {"evaluations": []})
    entry = {
        "number": trial.number,
        "state": _state(trial),
        "values": settings.space.values(trial.params),
        "score": trial.value if complete else None,
        **{key: value for key, value in measured.items() if key != "diverged"},
        "seconds": trial.duration.total_seconds() if trial.duration else None,
    }
    if complete:
        entry["record"] = f"{trial_folder(trial.number)}/{RECORD_FILE}"
    if ERROR in trial.user_attrs:
        entry["error"] = trial.user_attrs[ERROR]
    return entry


def _best_config(settings: SweepSettings, best: FrozenTrial) -> str:
    recipe, values = settings.recipe or settings.config, settings.space.values(best.params)
    config = with_values(recipe, values, f"trial {best.number}")
    weights, sections = weights_folder(config.train.method), config.to_dict()
    del sections["output"]
    sections["model"]["precision"] = best.user_attrs[PRECISION]
    header = (
        f"# The best of the sweep {settings.name}: trial {best.number}, {settings.score} {best.value}.\n"
        f"# Its {weights}: {settings.folder / trial_folder(best.number) / weights}\n"
        f"# python scripts/train.py --config {shlex.quote(str(settings.folder / BEST_CONFIG))}\n"
    )
    return header + yaml.safe_dump(sections, sort_keys=False)


def trial_folder(number: int) -> str:
    return f"trial-{number}"


def best_trial(trials: Sequence[FrozenTrial], maximize: bool) -> FrozenTrial | None:
    """The complete trial with the best value; of equal ones that with the smallest loss, then the first."""
    sign = -1 if maximize else 1

    def order(trial: FrozenTrial) -> tuple[float, float, int]:
        loss = trial.user_attrs.get(MEASURED, {}).get("loss")
        return sign * (trial.value or 0), 0 if loss is None else loss, trial.number

    return min((trial for trial in trials if trial.state == TrialState.COMPLETE), key=order, default=None)


def remove_files(folder: Path, trials: Sequence[FrozenTrial], best: FrozenTrial | None) -> None:
    """Removes the checkpoints of all finished trials, and the weights and predictions of all but the best.

    Several processes may do this at once: a finished trial that is not the best now never becomes the best.
    """
    for trial in trials:
        run = folder / trial_folder(trial.number)
        if not trial.state.is_finished() or not run.is_dir():
            continue
        is_best = best is not None and trial.number == best.number
        for entry in run.iterdir():
            if entry.name == "checkpoints" or not (is_best or entry.name in KEPT):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
