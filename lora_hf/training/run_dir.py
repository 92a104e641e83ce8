"""The folder of a run: a new one to begin in, or the unfinished one to resume."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lora_hf.core.atomic_io import atomic_path
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE
from lora_hf.training.checkpoints import (
    STATE_FILE,
    check_world_size,
    checkpoints_in,
    delete_newer,
    find_damage,
    newest_valid,
)

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"


def find_run_folder(config: RunConfig, resume: str | None) -> tuple[Path, Path | None]:
    """The folder of the run and the checkpoint to resume from; nothing is created or written yet.

    Raises:
        ConfigError: another run is in the way, or `resume` is no checkpoint.
    """
    if resume is not None and resume != "auto":
        checkpoint = Path(resume)
        if not (checkpoint / STATE_FILE).is_file():
            raise ConfigError(f"resume={resume}: expected a checkpoint folder with {STATE_FILE}, or auto")
        if damage := find_damage(checkpoint):
            raise ConfigError(f"resume={resume}: {damage}; resume=auto takes the newest valid checkpoint")
        check_world_size(checkpoint)
        return checkpoint.resolve().parent.parent, checkpoint.resolve()
    if resume == "auto":
        folder = _unfinished(config)
        if folder is not None:
            newest = newest_valid(folder / CHECKPOINTS_FOLDER)
            if newest is not None:
                check_world_size(newest)
            return folder, newest
    folder = Path(config.output.dir) / (config.output.name or _default_name(config))
    _check_free(folder, config)
    if resume == "auto":
        logger.warning("resume=auto: found no unfinished run of this config with a checkpoint; starting a new run")
    return folder, None


def check_run_folder(config: RunConfig, resume: str | None) -> None:
    """Raises what `find_run_folder` will raise, as far as that is known before torch has chosen the precision."""
    if resume != "auto":
        find_run_folder(config, resume)
    elif config.output.name is not None and _unfinished(config) is None:
        _check_free(Path(config.output.dir) / config.output.name, config)


def config_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ between two configs, in words.

    The precision may differ where `auto` is asked for: torch has yet to choose it.
    """
    return [
        f"{section}.{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for section, new in here.items()
        for old in [there.get(section) or {}]
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key) and (key, new.get(key)) != ("precision", "auto")
    ]


def _default_name(config: RunConfig) -> str:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{config.task.name}-{Path(config.model.name).name}-{config.train.method}-{stamp}"


def _check_free(folder: Path, config: RunConfig) -> None:
    """Raises ConfigError where a new run cannot begin in `folder`."""
    if config.output.overwrite:
        return
    if (folder / RECORD_FILE).exists():
        raise ConfigError(f"{folder}: holds a finished run; choose another output.name, or set output.overwrite=true")
    if not checkpoints_in(folder / CHECKPOINTS_FOLDER):
        return
    saved = _saved_config(folder)
    if saved is None:
        content = f"an unfinished run without a readable {RUN_CONFIG_FILE}"
    elif differences := config_differences(saved, config.to_dict()):
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        content = f"an unfinished run of another config: {'; '.join(differences[:4])}{more}"
    else:
        content = "an unfinished run of this config; continue it with resume=auto"
    raise ConfigError(f"{folder}: holds {content}; choose another output.name, or set output.overwrite=true")


def begin_run(config: RunConfig, folder: Path, checkpoint: Path | None) -> None:
    """Creates the folder and writes its config; deletes what a run wrote after the checkpoint, or before a new start.

    Raises:
        ConfigError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir: cannot create {folder}: {error.strerror}") from error
    (folder / RECORD_FILE).unlink(missing_ok=True)
    if checkpoint is None:
        (folder / LOG_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)
    else:
        delete_newer(checkpoint)
        _cut_log(folder / LOG_FILE, int(checkpoint.name.rpartition("-")[2]))
    with atomic_path(folder / RUN_CONFIG_FILE) as partial:
        partial.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines of a log after `step`, and one that was cut off: the resumed run writes them again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    complete = (line for line in lines if line.endswith("\n"))
    path.write_text("".join(line for line in complete if json.loads(line)["step"] <= step), encoding="utf-8")


def _unfinished(config: RunConfig) -> Path | None:
    """The newest run of this config that has a checkpoint and no record yet."""
    files = Path(config.output.dir).glob(f"*/{RUN_CONFIG_FILE}")
    for folder in (file.parent for file in sorted(files, key=os.path.getmtime, reverse=True)):
        if (folder / RECORD_FILE).exists() or not checkpoints_in(folder / CHECKPOINTS_FOLDER):
            continue
        saved = _saved_config(folder)
        if saved is not None and not config_differences(saved, config.to_dict()):
            return folder
    return None


def _saved_config(folder: Path) -> dict[str, Any] | None:
    """The sections of the config that a run was started with; None where they cannot be read."""
    try:
        sections = yaml.safe_load((folder / RUN_CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    good = isinstance(sections, dict) and all(isinstance(keys, dict) for keys in sections.values())
    return sections if good else None
