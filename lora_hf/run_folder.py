"""Where a run is: the folder that it begins in, or the unfinished one that it goes on in."""

from __future__ import annotations

import logging
import os
import shutil
from datetime import datetime
from pathlib import Path

import yaml

from lora_hf.checkpoints import check_processes, checkpoints_in, drop_newer, newest_whole, problem_of
from lora_hf.config import RunConfig
from lora_hf.errors import ConfigError
from lora_hf.records import RECORD_FILE, RUN_CONFIG_FILE

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"


def find_run_folder(config: RunConfig, resume: str | None) -> tuple[Path, Path | None]:
    """The folder of the run and the checkpoint to go on from; nothing is made or written yet."""
    if resume is not None and resume != "auto":
        checkpoint = Path(resume)
        if not (checkpoint / "trainer_state.json").is_file():
            raise ConfigError(f"--resume {resume}: expected a checkpoint folder with trainer_state.json, or 'auto'")
        if problem := problem_of(checkpoint):
            raise ConfigError(f"--resume {resume}: {problem}; --resume auto goes on from the newest that is whole")
        check_processes(checkpoint)
        return checkpoint.resolve().parent.parent, checkpoint.resolve()
    if resume == "auto":
        folder = _unfinished(config)
        if folder is not None:
            newest = newest_whole(folder / CHECKPOINTS)
            if newest is not None:
                check_processes(newest)
            return folder, newest
        logger.warning("--resume auto: no unfinished run of this config with a checkpoint; starting from the beginning")
    name = config.output.name
    if name is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{config.task.name}-{Path(config.model.name).name}-{config.train.method}-{stamp}"
    folder = Path(config.output.dir) / name
    if (folder / RECORD_FILE).exists() and not config.output.overwrite:
        raise ConfigError(f"{folder}: holds a finished run; choose another output.name, or set output.overwrite=true")
    if checkpoints_in(folder / CHECKPOINTS) and not config.output.overwrite:
        whose = "an unfinished run of another config" if resume else "an unfinished run; go on with --resume auto"
        raise ConfigError(f"{folder}: holds {whose}; choose another output.name, or set output.overwrite=true")
    return folder, None


def begin_run(config: RunConfig, folder: Path, checkpoint: Path | None) -> None:
    """Makes the folder and writes its config; what a run wrote after the checkpoint, or before a fresh start, goes.

    Raises:
        ConfigError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir: cannot make {folder}: {error.strerror}") from error
    (folder / RECORD_FILE).unlink(missing_ok=True)
    if checkpoint is None:
        (folder / LOG_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    else:
        drop_newer(checkpoint)
    aside = folder / f"{RUN_CONFIG_FILE}.part"
    aside.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    aside.replace(folder / RUN_CONFIG_FILE)


def _unfinished(config: RunConfig) -> Path | None:
    """The newest run of this config that has a checkpoint and no record yet."""
    places = Path(config.output.dir).glob(f"*/{RUN_CONFIG_FILE}")
    for place in sorted(places, key=os.path.getmtime, reverse=True):
        folder = place.parent
        if (folder / RECORD_FILE).exists() or not checkpoints_in(folder / CHECKPOINTS):
            continue
        try:
            found = yaml.safe_load(place.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if found == config.to_dict():
            return folder
    return None
