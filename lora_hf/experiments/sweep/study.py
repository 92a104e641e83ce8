"""The sweep: trials until there are enough, alone or with other processes, and the files that say what came out."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import yaml
from datasets import Dataset
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import URL

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.core.records import RECORD_FILE, SweepRecord
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.registry import task_of
from lora_hf.experiments.sweep.plots import draw_plots
from lora_hf.experiments.sweep.space import Space, with_values
from lora_hf.experiments.sweep.storage import (
    ERROR,
    GRACE,
    SeededSampler,
    check_study,
    experimental,
    finished,
    open_study,
    parse_url,
    told,
)
from lora_hf.experiments.sweep.trials import (
    PRECISION,
    TrialFailed,
    best_trial,
    free_memory,
    run_trial,
    tidy,
    trial_folder,
)

logger = logging.getLogger(__name__)

DATABASE, BEST, BEST_CONFIG, SWEEP_RECORD = "study.db", "best", "best.yaml", "trials.json"
POLL = 1.0  # seconds between two looks at the trials of other processes


@dataclass(frozen=True)
class Sweep:
    """A sweep: which trials, and where they go."""

    config: RunConfig
    space: Space
    name: str
    folder: Path
    trials: int
    seed: int
    url: URL

    @property
    def task(self) -> Task:
        return task_of(self.config.task)

    @property
    def maximise(self) -> bool:
        return self.task.greater_is_better

    @property
    def score(self) -> str:
        """What a trial's value is: the split and the metric."""
        return f"{self.task.evaluation_splits[0]} {self.task.best_metric}"


def sweep(
    config: RunConfig,
    space: Space,
    trials: int,
    name: str,
    storage: str | None = None,
    seed: int = 0,
    rows: Mapping[str, Dataset] | None = None,
) -> tuple[Path, SweepRecord]:
    """Runs trials until the study has `trials` that are complete, pruned or failed, and writes what came out.

    Args:
        config: what all trials share; `output.dir` is where the folder of the study goes.
        name: of the study and of its folder.
        storage: the URL of a database that other processes may share; without: a SQLite file in the folder.
        seed: of the sampler.
        rows: the task's splits, where they have been read already.

    Returns:
        The folder of the study, which then holds `best` (a link to the best trial's), `best.yaml`, `trials.json` and
        the pictures; and the record.

    Raises:
        ConfigError: the storage cannot be used, or the study is one of other trials.
        TrainingError: every trial failed.
        UserError: whatever of the config or the data no trial can use.
    """
    check_study(name, trials)
    folder = Path(config.output.dir) / name
    url = parse_url(storage or f"sqlite:///{folder / DATABASE}")
    this = Sweep(config, space, name, folder, trials, seed, url)
    rows = rows or this.task.load(config.task.data_dir, this.task.splits)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {config.output.dir}: cannot make {folder}: {error.strerror}") from error
    # Looked at before the study is read: a folder that another process makes meanwhile belongs to a trial of the study.
    strangers = sorted(place.parent.name for place in folder.glob(f"trial-*/{RECORD_FILE}"))
    with told(url):
        study = open_study(url, name, SeededSampler(seed), this.maximise, about(this))
        if strangers and not study.get_trials(deepcopy=False):
            raise ConfigError(
                f"{folder}: holds {strangers[0]} of a study that is not in the storage; choose another --study or "
                "--output"
            )
        count = sum(map(finished, study.get_trials(deepcopy=False)))
        logger.info("study %s: %d trials, %d of them finished already", name, trials, count)
        run_trials(this, study, rows)
        done = study.get_trials(deepcopy=False)
    return folder, write_results(this, done)


def about(this: Sweep) -> dict[str, Any]:
    """What the trials of a study have in common, and their values are compared under."""
    config = this.config.to_dict()
    del config["output"]
    return {"config": config, "space": this.space.words(), "seed": this.seed}


def run_trials(this: Sweep, study: optuna.Study, rows: Mapping[str, Dataset]) -> None:
    """Runs trials as long as the study wants more, and waits for those that other processes run."""
    waiting = False
    while True:
        with experimental():
            fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        running = [trial for trial in trials if alive(trial)]
        if len(running) + sum(map(finished, trials)) < this.trials:
            waiting = False
            one_trial(this, study, rows)
        elif running:
            if not waiting:
                logger.info(
                    "waiting for %d trials of other processes; one whose process died is given up after %d s",
                    len(running),
                    GRACE,
                )
            waiting = True
            time.sleep(POLL)
        else:
            return


def alive(trial: FrozenTrial) -> bool:
    """Whether a process runs the trial, as far as can be seen.

    One that was killed before its first sign of life gives no heartbeat that could be missed; it has no values either.
    """
    if trial.state != TrialState.RUNNING:
        return False
    started = trial.datetime_start
    return bool(trial.params) or started is None or (datetime.now() - started).total_seconds() < GRACE


def one_trial(this: Sweep, study: optuna.Study, rows: Mapping[str, Dataset]) -> None:
    """Draws values, trains with them, and says how it went."""

    lost = False  # whether others gave the trial up while it ran

    def objective(trial: Trial) -> float:
        nonlocal lost
        before = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
        if sum(alive(other) or finished(other) for other in before) >= this.trials:
            raise TrialFailed("another process took the last trial at the same moment")
        this.space.draw(trial)
        values = this.space.values(trial.params)
        config = with_values(this.config, values, f"trial {trial.number}")
        output = replace(config.output, dir=str(this.folder), name=trial_folder(trial.number), overwrite=True)
        try:
            return run_trial(trial, replace(config, output=output), this.task, rows)
        finally:
            lost = study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING

    def tell(study: optuna.Study, trial: FrozenTrial) -> None:
        trials = study.get_trials(deepcopy=False)
        best = best_trial(trials, this.maximise)
        tidy(this.folder, trials, best)
        if trial.params:
            logger.info("%s", line(this, trial, best))
        complete = [other for other in trials if other.state == TrialState.COMPLETE]
        if [other.number for other in complete] == [trial.number] and len(trial.intermediate_values) < 2:
            logger.info(
                "trials are evaluated once, at their end, so none can be pruned; to change that: train.epochs > 1, or "
                "'train.hf={eval_strategy: steps, eval_steps: 50, save_strategy: steps, save_steps: 50}'"
            )

    try:
        study.optimize(objective, n_trials=1, catch=(TrialFailed,), callbacks=[tell])
    except (UpdateFinishedTrialError, ValueError, AssertionError):  # what Optuna says then depends on where it notices
        if not lost:
            raise
        logger.warning("a trial of this process gave no sign of life for %d s, and others gave it up", GRACE)
    free_memory()


def line(this: Sweep, trial: FrozenTrial, best: FrozenTrial | None) -> str:
    """A finished trial in a line."""
    if trial.state == TrialState.COMPLETE:
        outcome = f"{this.score} {trial.value:.4f}"
    elif trial.state == TrialState.PRUNED:
        last = trial.intermediate_values[max(trial.intermediate_values)]
        outcome = f"pruned after evaluation {len(trial.intermediate_values)}, {this.score} {last:.4f}"
    else:
        outcome = f"failed: {trial.user_attrs.get(ERROR, 'interrupted')}"
    so_far = f"; best so far {best.value:.4f}, trial {best.number}" if best else ""
    return f"trial {trial.number}: {typed(this.space.values(trial.params))}: {outcome}{so_far}"


def typed(values: Mapping[str, Any]) -> str:
    """Keys and values as they are typed on the command line, numbers with four digits."""
    words = []
    for key, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else yaml.safe_dump(value, default_flow_style=True)
        words.append(f"{key}={text.removesuffix('...' + chr(10)).strip()}")
    return " ".join(words)


def write_results(this: Sweep, trials: Sequence[FrozenTrial]) -> SweepRecord:
    """Writes the record, the pictures, and the best config, whole or not at all.

    Raises:
        TrainingError: no trial is complete.
    """
    drawn = [trial for trial in trials if trial.params]
    best = best_trial(drawn, this.maximise)
    record = SweepRecord(
        study=this.name,
        task=this.task.name,
        split=this.task.evaluation_splits[0],
        metric=this.task.best_metric,
        greater_is_better=this.maximise,
        **about(this),
        trials=[_trial(this, trial) for trial in drawn],
        best=_trial(this, best) if best else {},
        versions=versions() | {"optuna": optuna.__version__},
        git=git_state(),
        machine=machine(),
    )
    # Other processes of the sweep may write the same files at this moment.
    with tempfile.TemporaryDirectory(prefix=".results-", dir=this.folder) as aside:
        record.importance = draw_plots(drawn, this.space, this.maximise, this.score, Path(aside))
        record.write(Path(aside) / SWEEP_RECORD)
        if best:
            (Path(aside) / BEST).symlink_to(trial_folder(best.number))
            (Path(aside) / BEST_CONFIG).write_text(_best_config(this, best), encoding="utf-8")
        for file in Path(aside).iterdir():
            file.replace(this.folder / file.name)
    if best is None:
        errors = [trial["error"] for trial in record.trials if "error" in trial]
        raise TrainingError(
            f"all {len(errors)} trials failed; the first said: {errors[0]}" if errors else "no trial is complete"
        )
    return record


def _trial(this: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    """A trial in the record. An interrupted one is neither complete nor failed: its process died or was stopped."""
    state = "interrupted" if trial.state == TrialState.FAIL and not finished(trial) else _STATES[trial.state]
    entry: dict[str, Any] = {"number": trial.number, "state": state, "values": this.space.values(trial.params)}
    entry["score"] = trial.value if trial.state == TrialState.COMPLETE else None
    entry["evaluations"] = [trial.intermediate_values[at] for at in sorted(trial.intermediate_values)]
    entry["seconds"] = trial.duration.total_seconds() if trial.duration else None
    if trial.state == TrialState.COMPLETE:
        entry["record"] = f"{trial_folder(trial.number)}/{RECORD_FILE}"
    if ERROR in trial.user_attrs:
        entry["error"] = trial.user_attrs[ERROR]
    return entry


_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def states(record: SweepRecord) -> dict[str, int]:
    """How many trials of the record ended how."""
    return dict(Counter(trial["state"] for trial in record.trials))


def _best_config(this: Sweep, best: FrozenTrial) -> str:
    """The best trial's config as a recipe."""
    config = with_values(this.config, this.space.values(best.params), f"trial {best.number}")
    sections = config.to_dict()
    del sections["output"]
    sections["model"]["precision"] = best.user_attrs[PRECISION]
    return (
        f"# The best of the sweep {this.name}: trial {best.number}, {this.score} {best.value}.\n"
        f"# Its adapter: {this.folder / trial_folder(best.number) / 'adapter'}\n"
        f"# python scripts/train.py --config {this.folder / BEST_CONFIG}\n" + yaml.safe_dump(sections, sort_keys=False)
    )
