"""Checkpoints that are whole or not there: written aside, listed with their digests, renamed, and checked when read.

A run may die at any moment. What stands in `checkpoints/checkpoint-N` was complete before it got that name, and its
`manifest.json` tells damage that came later.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.training.distributed import rank, world_size

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
PROGRESS = "progress.json"  # what the Trainer does not keep
PARTIAL_DIR = ".writing"  # beside the checkpoints; the Trainer looks for none in it
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or damaged, the newest first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(found, key=lambda path: found[path], reverse=True)


def finalize_checkpoint(written: Path, final: Path) -> None:
    """Gives a checkpoint that was written aside its manifest and its place."""
    digests = {str(file.relative_to(written)): digest(file) for file in sorted(written.rglob("*")) if file.is_file()}
    (written / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    # Else a machine that loses its power may keep the new name and not the bytes.
    for path in (*(written / name for name in digests), written / MANIFEST, written):
        _flush(path)
    replaced = written.with_name(f"{final.name}.replaced")
    if final.exists():
        final.replace(replaced)
    written.replace(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def find_damage(checkpoint: Path, best: bool = True) -> str:
    """What keeps a run from going on at a checkpoint; an empty string where nothing does.

    Args:
        best: look at the checkpoint with the best score so far as well: a run ends with its weights.
    """
    try:
        digests: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        missing = [name for name in digests if not (checkpoint / name).is_file()]
        changed = [
            name for name, known in digests.items() if name not in missing and digest(checkpoint / name) != known
        ]
        if missing or changed:
            said = [*(f"{name} is missing" for name in missing), *(f"{name} has changed" for name in changed)]
            return f"{checkpoint.name} is damaged: {', '.join(said)}"
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{checkpoint.name} is damaged: {error}"
    chosen = checkpoint.with_name(f"checkpoint-{state.get('best_global_step')}")
    if best and state.get("best_model_checkpoint") and chosen != checkpoint and find_damage(chosen, best=False):
        return f"{checkpoint.name} needs the best checkpoint so far, and {find_damage(chosen, best=False)}"
    return ""


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint that a run can go on from; those that are damaged are named in a warning."""
    for checkpoint in checkpoints_in(folder):
        problem = find_damage(checkpoint)
        if not problem:
            return checkpoint
        logger.warning("%s: %s; going back to the one before", folder, problem)
    return None


def check_world_size(checkpoint: Path) -> None:
    """Raises ConfigError where other than this many processes wrote it: their steps had as many rows as they were."""
    try:
        before = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")).get("processes", 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint}: not a checkpoint of lora_hf: {error}") from error
    if before != world_size():
        raise ConfigError(
            f"{checkpoint}: expected as many processes as wrote it, {before}, found {world_size()}; start {before}, or "
            "begin again with another output.name"
        )


def delete_newer(checkpoint: Path) -> None:
    """Deletes the checkpoints after this one, and what was being written: the run makes them again."""
    shutil.rmtree(checkpoint.parent / PARTIAL_DIR, ignore_errors=True)
    for other in checkpoints_in(checkpoint.parent):
        if other == checkpoint:
            return
        shutil.rmtree(other)


def rotate_checkpoints(folder: Path, keep: int | None, best: Path | None) -> None:
    """Deletes the oldest checkpoints but `keep`; the newest and the best always stay."""
    found = checkpoints_in(folder)
    spare = [checkpoint for checkpoint in reversed(found[1:]) if best is None or checkpoint.name != best.name]
    for checkpoint in spare[: max(0, len(found) - keep) if keep else 0]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def digest(file: Path) -> str:
    """The SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


@contextmanager
def translate_disk_full(folder: Path) -> Iterator[None]:
    """Turns a disk that takes no more into a message with the checkpoint that the run can go on from.

    Raises:
        TrainingError: the disk is full, or a limit on sizes is reached.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # Only Python's own files tell the number; safetensors and torch have words for it.
        words = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter", "inline_container")
        if getattr(error, "errno", None) not in DISK_FULL_ERRNOS and not any(word in str(error) for word in words):
            raise
        shutil.rmtree(folder / "checkpoints" / PARTIAL_DIR, ignore_errors=True)
        raise TrainingError(
            f"{folder}: cannot be written: {str(error).splitlines()[0]}. Free some space; then {resume_hint(folder)}"
        ) from error


@contextmanager
def translate_lost_process(folder: Path) -> Iterator[None]:
    """Turns what a process meets once another one has ended into a message.

    Raises:
        TrainingError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
        if world_size() == 1 or not any(word in str(error) for word in words):
            raise
        said = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise TrainingError(
            f"process {rank()} has lost another, which was killed or failed: {said}; {resume_hint(folder)}"
        ) from error


def resume_hint(folder: Path) -> str:
    """The last words of a run that stops early: from where, and how."""
    checkpoint = newest_valid(folder / "checkpoints")
    if checkpoint is None:
        return "start again with the same command: no checkpoint had been saved yet"
    return f"go on after step {checkpoint.name.rpartition('-')[2]} with the same command and --resume auto"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
