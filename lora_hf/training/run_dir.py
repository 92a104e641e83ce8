"""Where a run is: the folder that it begins in, or the unfinished one that it goes on in."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE
from lora_hf.training.checkpoints import check_world_size, checkpoints_in, delete_newer, find_damage, newest_valid

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"


def find_run_folder(config: RunConfig, resume: str | None) -> tuple[Path, Path | None]:
    """The folder of the run and the checkpoint to go on from; nothing is made or written yet.

    Raises:
        ConfigError: a run lies in the way, or `resume` is no checkpoint.
    """
    if resume is not None and resume != "auto":
        checkpoint = Path(resume)
        if not (checkpoint / "trainer_state.json").is_file():
            raise ConfigError(f"--resume {resume}: expected a checkpoint folder with trainer_state.json, or 'auto'")
        if problem := find_damage(checkpoint):
            raise ConfigError(f"--resume {resume}: {problem}; --resume auto goes on from the newest that is whole")
        check_world_size(checkpoint)
        return checkpoint.resolve().parent.parent, checkpoint.resolve()
    if resume == "auto":
        folder = _unfinished(config)
        if folder is not None:
            newest = newest_valid(folder / CHECKPOINTS)
            if newest is not None:
                check_world_size(newest)
            return folder, newest
    folder = Path(config.output.dir) / (config.output.name or _stamped(config))
    _check_free(folder, config)
    if resume == "auto":
        logger.warning("--resume auto: no unfinished run of this config with a checkpoint; starting from the beginning")
    return folder, None


def check_run_folder(config: RunConfig, resume: str | None) -> None:
    """What `find_run_folder` will refuse, as far as it is known before torch has chosen the precision.

    Raises:
        ConfigError: as `find_run_folder`.
    """
    if resume != "auto":
        find_run_folder(config, resume)
    elif config.output.name is not None and _unfinished(config) is None:
        _check_free(Path(config.output.dir) / config.output.name, config)


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ in two configs, in words: `found` is there, `wanted` is here.

    The precision may differ where `auto` is asked for: torch has yet to choose it.
    """
    return [
        f"{section}.{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for section, here in wanted.items()
        for there in [found.get(section) or {}]
        for key in dict.fromkeys([*here, *there])
        if there.get(key) != here.get(key) and (key, here.get(key)) != ("precision", "auto")
    ]


def _stamped(config: RunConfig) -> str:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{config.task.name}-{Path(config.model.name).name}-{config.train.method}-{stamp}"


def _check_free(folder: Path, config: RunConfig) -> None:
    """Raises ConfigError where a new run cannot begin in `folder`."""
    if config.output.overwrite:
        return
    if (folder / RECORD_FILE).exists():
        raise ConfigError(f"{folder}: holds a finished run; choose another output.name, or set output.overwrite=true")
    if not checkpoints_in(folder / CHECKPOINTS):
        return
    found = _config_in(folder)
    if found is None:
        whose = f"an unfinished run without a {RUN_CONFIG_FILE} that can be read"
    elif different := differing(found, config.to_dict()):
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        whose = f"an unfinished run of another config: {'; '.join(different[:4])}{more}"
    else:
        whose = "an unfinished run; go on with --resume auto"
    raise ConfigError(f"{folder}: holds {whose}; choose another output.name, or set output.overwrite=true")


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
        delete_newer(checkpoint)
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
        found = _config_in(folder)
        if found is not None and not differing(found, config.to_dict()):
            return folder
    return None


def _config_in(folder: Path) -> dict[str, Any] | None:
    """The sections of the config that a run was started with; None where they cannot be read."""
    try:
        found = yaml.safe_load((folder / RUN_CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) and all(isinstance(keys, dict) for keys in found.values()) else None
