"""Finds and prepares the folder of a run: a new one, or an unfinished one to resume."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lora_hf.core.atomic_io import atomic_path
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.parsing import parse_json, read_yaml
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.multi_label import MultiLabelClassification
from lora_hf.training.checkpoints import (
    STATE_FILE,
    check_world_size,
    checkpoints_in,
    delete_newer,
    find_damage,
    is_evaluation,
    newest_valid,
    read_progress,
    reopen,
)
from lora_hf.training.distributed import all_reduce_max, rank

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
CURVES = "curves.png"
PICTURES = (CURVES, "confusion-*.png", "reliability-*.png")
# Of the weights that a run ends with; `eval` writes the scores.
RESULTS = (RECORD_FILE, *PICTURES, "predictions-*", "outputs-*.jsonl", "scores-*.json")
LOCK_FILE = ".lock"  # held while a run trains in the folder; the system releases it when the process dies

# What a run may change when it resumes from a checkpoint that is named: it concerns no step of the training. The
# fingerprint in the checkpoint proves that a base of another name has the same weights.
FREE_TO_CHANGE = ("model.name", "task.data_dir", "task.thresholds", "train.eval_batch_size", "generate.", "output.")
LENGTHS = ("train.epochs ", "train.max_steps ")  # what a finished run may have more of when it resumes


def weights_folder(method: str) -> str:
    """Returns the name of the folder for the weights that `train.method` trains."""
    return "model" if method == "full" else "adapter"


def find_run_folder(config: RunConfig, resume: str | None) -> tuple[Path, Path | None]:
    """Returns the folder of the run and the checkpoint to resume from. Creates and writes nothing.

    `resume=auto` replaces only the results of a run that it trains for longer, whatever `output.overwrite` says.

    Raises:
        ConfigError: another run is in the way, or still training there; `resume` is not a checkpoint, or belongs to a
            run with another config.
    """
    if resume is not None and resume != "auto":
        return _resume_from(config, Path(resume))
    if resume == "auto":
        folder = _resumable(config)
        if folder is not None:
            _check_unlocked(folder)
            newest = newest_valid(folder / CHECKPOINTS_FOLDER)
            if newest is not None:
                check_world_size(newest)
            return folder, newest
    folder = Path(config.output.dir) / (config.output.name or _default_name(config))
    _check_free(folder, config, resume)
    if resume == "auto":
        logger.warning("resume=auto: found no unfinished run of this config with a checkpoint; starting a new run")
    return folder, None


def check_run_folder(config: RunConfig, resume: str | None) -> None:
    """Raises errors of `find_run_folder` early, as far as they are known before torch chooses the precision."""
    if resume != "auto":
        find_run_folder(config, resume)
    elif config.output.name is not None and _resumable(config) is None:
        _check_free(Path(config.output.dir) / config.output.name, config, resume)


def _resume_from(config: RunConfig, checkpoint: Path) -> tuple[Path, Path]:
    """The run folder of a checkpoint that the user names, and the checkpoint."""
    if not (checkpoint / STATE_FILE).is_file():
        raise ConfigError(f"resume={checkpoint}: expected a checkpoint folder with {STATE_FILE}, or auto")
    if damage := find_damage(checkpoint):
        raise ConfigError(f"resume={checkpoint}: {damage}; resume=auto takes the newest valid checkpoint")
    check_world_size(checkpoint)
    checkpoint = checkpoint.resolve()
    folder = checkpoint.parent.parent
    _check_unlocked(folder)
    saved = _saved_config(folder)
    if saved is None:
        raise ConfigError(f"resume={checkpoint}: expected the config of its run in {folder / RUN_CONFIG_FILE}")
    differences = config_differences(saved, config.to_dict())
    longer = lengthens(saved, config)
    free = (*FREE_TO_CHANGE, *(LENGTHS if longer else ()))
    changed = [each for each in differences if not each.startswith(free)]
    if changed:
        raise ConfigError(
            f"resume={checkpoint}: its run has another config: {_listed(changed)}. A run resumes with the config it "
            "began with: restore these values, or start a new run from these LoRA weights with "
            "train.start_from=ADAPTER"
        )
    newer = [other.name for other in checkpoints_in(checkpoint.parent) if _step(other) > _step(checkpoint)]
    newer = [name for name in newer if not find_damage(checkpoint.with_name(name))]
    in_the_way = [RECORD_FILE] * (not longer and (folder / RECORD_FILE).exists()) + newer
    if in_the_way and not config.output.overwrite:
        raise ConfigError(
            f"resume={checkpoint}: {', '.join(in_the_way)} in {folder} would be replaced; set output.overwrite=true to "
            "go back to this checkpoint" + ("" if RECORD_FILE in in_the_way else ", or use resume=auto for the newest")
        )
    for difference in differences:
        logger.info("resume=%s: %s", checkpoint, difference)
    return folder, checkpoint


def config_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Describes the keys whose values differ between two configs.

    With precision `auto`, the precision may differ, because torch has not chosen it yet. `output.overwrite` is ignored.
    """
    return [
        f"{section}.{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for section, new in here.items()
        for old in [there.get(section) or {}]
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key) and (key, new.get(key)) != ("precision", "auto") and key != "overwrite"
    ]


def lengthens(there: Mapping[str, Any], here: RunConfig) -> bool:
    """Whether a config has more epochs or `max_steps` than the one that a run began with."""
    before, now = there.get("train") or {}, here.to_dict()["train"]
    key = _length_key(here)
    other = "max_steps" if key == "epochs" else "epochs"
    same = before.get(other) == now[other]
    return same and isinstance(before.get(key), (int, float)) and now[key] > before[key]


def _length_key(config: RunConfig) -> str:
    """The key of `train` that sets how long the run is."""
    return "epochs" if config.train.max_steps is None else "max_steps"


def describe_longer(there: Mapping[str, Any], here: RunConfig, checkpoint: Path) -> str:
    """Describes what changes when a finished run is trained for longer."""
    train, before, key = here.train, there["train"], _length_key(here)
    text = (
        f"train.{key} is {getattr(train, key):g} instead of {before[key]:g}: training goes on after {checkpoint.name}"
    )
    if train.schedule in ("linear", "cosine"):
        text += (
            f"; schedule={train.schedule} now ends with the longer run, so the learning rate rises again to where that "
            "run would have it"
        )
    if train.warmup_steps is None and train.warmup_ratio and train.schedule != "constant":
        text += f"; warmup_ratio={train.warmup_ratio:g} is a share of the longer run too"
    return text


def _default_name(config: RunConfig) -> str:
    time = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # tells also those of one second apart
    return f"{config.task.name:.60}-{Path(config.model.name).name:.60}-{config.train.method}-{time}"


def _listed(differences: Sequence[str]) -> str:
    more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
    return f"{'; '.join(differences[:4])}{more}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _check_free(folder: Path, config: RunConfig, resume: str | None) -> None:
    """Raises ConfigError if a new run cannot begin in `folder`."""
    _check_unlocked(folder)
    if config.output.overwrite and resume is None:
        return
    replace = "leave out resume=auto" if config.output.overwrite else "set output.overwrite=true"
    if (folder / RECORD_FILE).exists():
        raise ConfigError(
            f"{folder}: holds a finished run; choose another output.name, or {replace}. To train it for longer, "
            "raise train.epochs or train.max_steps, and set resume=auto"
        )
    if not checkpoints_in(folder / CHECKPOINTS_FOLDER):
        return
    saved = _saved_config(folder)
    if saved is None:
        content = f"an unfinished run without a readable {RUN_CONFIG_FILE}"
    elif differences := config_differences(saved, config.to_dict()):
        content = f"an unfinished run of another config: {_listed(differences)}"
    else:
        content = "an unfinished run of this config; continue it with resume=auto"
    raise ConfigError(f"{folder}: holds {content}; choose another output.name, or {replace}")


@contextmanager
def run_lock(folder: Path) -> Iterator[FileLock]:
    """Yields the lock that `begin_run` acquires, and releases it at the end."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        yield lock
    finally:
        lock.release()


def run_state(folder: Path) -> list[str]:
    """What `begin_run` may delete: the record, and the checkpoints."""
    names = [checkpoint.name for checkpoint in checkpoints_in(folder / CHECKPOINTS_FOLDER)]
    return [RECORD_FILE] * (folder / RECORD_FILE).exists() + names


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of the run."""
    return sorted(path for pattern in PICTURES for path in folder.glob(pattern))


def begin_run(
    config: RunConfig, folder: Path, checkpoint: Path | None, lock: FileLock, before: Sequence[str] | None = None
) -> None:
    """Creates and locks the folder, writes its config, and deletes earlier results or those after the checkpoint.

    Args:
        before: the `run_state` on which the choice of folder and checkpoint was based.

    Raises:
        ConfigError: the folder cannot be created, or another run has used it in the meantime.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock, folder)
    except OSError as error:
        raise ConfigError(f"output.dir: cannot create {folder}: {error.strerror}") from error
    if before is not None and run_state(folder) != list(before):
        raise ConfigError(f"{folder}: another run has written here since this one started; start this one again")
    saved = _saved_config(folder)
    if checkpoint is not None and saved is not None and lengthens(saved, config):
        logger.warning("%s", describe_longer(saved, config, checkpoint))
        reopen(checkpoint)
    for pattern in RESULTS:
        for result in folder.glob(pattern):
            result.unlink(missing_ok=True)
    if checkpoint is None:
        (folder / LOG_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)
    else:
        delete_newer(checkpoint)
        _cut_log(folder / LOG_FILE, checkpoint)
    with atomic_path(folder / RUN_CONFIG_FILE) as partial:
        partial.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def save_thresholds(task: Task, file: Path) -> None:
    """Adds the thresholds that a run has chosen to its config, where `eval`, `predict` and `serve` read them."""
    if isinstance(task, MultiLabelClassification):
        sections = read_yaml(file)
        sections["task"]["thresholds"] = list(task.thresholds)
        with atomic_path(file) as partial:
            partial.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder}: another run is training here; wait until it ends, or choose another output.name"
        ) from None
    except NotImplementedError:
        logger.warning("%s: this file system has no locks, so a second run of this name is not detected", folder)


def _check_unlocked(folder: Path) -> None:
    """Raises ConfigError if a run is training in `folder`."""
    if rank() or not (folder / LOCK_FILE).is_file():  # two processes of one run must not meet here
        return
    with run_lock(folder) as lock, suppress(OSError):  # without write permission, `begin_run` will say so
        _acquire(lock, folder)


def _cut_log(path: Path, checkpoint: Path) -> None:
    """Removes log lines after the checkpoint, and a truncated one. The resumed run writes them again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    entries = [(line, parse_json(line)) for line in lines if line.endswith("\n")]
    step, due = _step(checkpoint), read_progress(checkpoint).get("evaluation_due")
    kept = [line for line, entry in entries if entry["step"] <= step and not (due and is_evaluation(entry, step))]
    path.write_text("".join(kept), encoding="utf-8")


def _resumable(config: RunConfig) -> Path | None:
    """The newest unfinished run of this config with a checkpoint, or else a finished run that it trains for longer."""
    files = Path(config.output.dir).glob(f"*/{RUN_CONFIG_FILE}")
    here, finished = config.to_dict(), None
    for folder in (file.parent for file in sorted(files, key=os.path.getmtime, reverse=True)):
        if not checkpoints_in(folder / CHECKPOINTS_FOLDER) or (saved := _saved_config(folder)) is None:
            continue
        # A run chooses its thresholds before it writes its other results, and may die in between.
        differences = [each for each in config_differences(saved, here) if not each.startswith("task.thresholds ")]
        if not (folder / RECORD_FILE).exists():
            if not differences:
                return folder
        elif finished is None and lengthens(saved, config):
            finished = folder if all(each.startswith(LENGTHS) for each in differences) else None
    return finished


def _saved_config(folder: Path) -> dict[str, Any] | None:
    """The sections of the config that a run was started with; None if they cannot be read."""
    try:
        sections = read_yaml(folder / RUN_CONFIG_FILE)
    except (OSError, ValueError):
        return None
    good = isinstance(sections, dict) and all(isinstance(keys, dict) for keys in sections.values())
    return sections if good else None


def check_shared_folder(folder: Path) -> None:
    """Raises ConfigError in all processes if one of them does not see the folder that rank 0 created."""
    if blind := all_reduce_max(0 if (folder / RUN_CONFIG_FILE).is_file() else rank()):
        raise ConfigError(
            f"output.dir: process {blind} does not see {folder}, which process 0 created; expected a folder that all "
            "machines share"
        )
