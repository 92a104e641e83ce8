"""Checkpoints of a run. A checkpoint is complete once it has a manifest, and it is checked when it is read.

A run may die at any moment. The Trainer writes `checkpoints/checkpoint-N`. Then `callbacks.CheckpointCallback` adds
what the Trainer does not save and, at the very end, `manifest.json` with the digest of every file. If the manifest is
missing, the run died while it wrote the checkpoint. If a digest differs, the checkpoint was damaged later. A run never
resumes from either.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_hf.core.atomic_io import atomic_path
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.parsing import read_json
from lora_hf.training.distributed import rank, world_size

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
STATE_FILE = "trainer_state.json"
PROGRESS_FILE = "progress.json"  # what the Trainer does not save
KEPT_CHECKPOINTS = 2  # one to go back to, should the newest be damaged
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch report a full disk in words only.
DISK_FULL_WORDS = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter", "inline_container")
LOST_PROCESS_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, the newest first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(found, key=lambda path: found[path], reverse=True)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What `CheckpointCallback` saved beside the Trainer's state.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        return read_json(checkpoint / PROGRESS_FILE)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint}: not a checkpoint of lora_hf: {error}") from error


def write_progress(checkpoint: Path, progress: Mapping[str, Any]) -> None:
    with atomic_path(checkpoint / PROGRESS_FILE) as partial:
        partial.write_text(json.dumps(progress), encoding="utf-8")


def reopen(checkpoint: Path) -> None:
    """Reopens the final checkpoint of a finished run, so that training can continue from it."""
    write_progress(checkpoint, read_progress(checkpoint) | {"finished": False})
    update_manifest(checkpoint, [PROGRESS_FILE])


def is_evaluation(entry: Mapping[str, Any], step: int) -> bool:
    """Whether a logged entry is an evaluation at `step`."""
    return entry["step"] == step and any(key.startswith("eval_") for key in entry)


def write_manifest(checkpoint: Path) -> None:
    """Completes a checkpoint: flushes every file to disk, then writes the list of their digests."""
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    _write_digests(checkpoint, {}, sorted(path for path in checkpoint.rglob("*") if path.is_file()))


def update_manifest(checkpoint: Path, changed: Iterable[str]) -> None:
    """Updates the digests of changed files, so that the checkpoint stays complete."""
    known = read_json(checkpoint / MANIFEST_FILE)
    _write_digests(checkpoint, known, [checkpoint / name for name in changed])


def _write_digests(checkpoint: Path, known: Mapping[str, str], files: Iterable[Path]) -> None:
    digests = dict(known)
    for file in files:
        digests[str(file.relative_to(checkpoint))] = sha256(file)
        _flush(file)
    with atomic_path(checkpoint / MANIFEST_FILE) as partial:
        partial.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        _flush(partial)
    for folder in (checkpoint, checkpoint.parent):  # else a power cut may keep a name and lose its bytes
        _flush(folder)


def find_damage(checkpoint: Path, check_best: bool = True) -> str:
    """The reason why a run cannot resume from a checkpoint, or an empty string if it can.

    Args:
        check_best: also check the best checkpoint so far, because the run ends with its weights.
    """
    if not (checkpoint / MANIFEST_FILE).is_file():
        return f"{checkpoint.name} is incomplete: the run stopped while it was written"
    try:
        digests: dict[str, str] = read_json(checkpoint / MANIFEST_FILE)
        missing = [name for name in digests if not (checkpoint / name).is_file()]
        changed = [
            name for name, known in digests.items() if name not in missing and sha256(checkpoint / name) != known
        ]
        if missing or changed:
            damage = [*(f"{name} is missing" for name in missing), *(f"{name} has changed" for name in changed)]
            return f"{checkpoint.name} is damaged: {', '.join(damage)}"
        state = read_json(checkpoint / STATE_FILE)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{checkpoint.name} is damaged: {error}"
    best = checkpoint.with_name(f"checkpoint-{state.get('best_global_step')}")
    if check_best and state.get("best_model_checkpoint") and best != checkpoint and find_damage(best, False):
        return f"{checkpoint.name} needs the best checkpoint so far, but {find_damage(best, False)}"
    return ""


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint that a run can resume from. A warning names each checkpoint that is skipped."""
    for checkpoint in checkpoints_in(folder):
        damage = find_damage(checkpoint)
        if not damage:
            return checkpoint
        logger.warning("%s: %s; trying the one before", folder, damage)
    return None


def check_world_size(checkpoint: Path) -> None:
    """Raises ConfigError if a different number of processes wrote the checkpoint: the batch size would change."""
    before = read_progress(checkpoint).get("processes", 1)
    if before != world_size():
        raise ConfigError(
            f"{checkpoint}: expected as many processes as wrote it, {before}, found {world_size()}; start {before}, or "
            "begin again with another output.name"
        )


def check_data(checkpoint: Path, digests: Mapping[str, str]) -> None:
    """Raises ConfigError if the run of the checkpoint began with other rows or another tokenizer.

    Args:
        digests: `tokenization.digest_of` by split.
    """
    before = read_progress(checkpoint).get("data", digests)  # versions before this one wrote none
    if changed := [split for split, digest in digests.items() if before.get(split) != digest]:
        raise ConfigError(
            f"{checkpoint}: the rows of {' and '.join(changed)}, or how the tokenizer encodes them, have changed since "
            "this run began. Restore the data and the tokenizer's files, or start a new run under another output.name"
        )


def delete_newer(checkpoint: Path) -> None:
    """Deletes the checkpoints after this one. The resumed run writes them again."""
    for other in checkpoints_in(checkpoint.parent):
        if other == checkpoint:
            return
        shutil.rmtree(other)


def rotate_checkpoints(folder: Path, keep: int | None, best_step: int | None) -> None:
    """Deletes the oldest checkpoints beyond `keep`; the newest and the best always stay."""
    found = checkpoints_in(folder)
    spare = [checkpoint for checkpoint in reversed(found[1:]) if checkpoint.name != f"checkpoint-{best_step}"]
    for checkpoint in spare[: max(0, len(found) - keep) if keep else 0]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def translate_disk_full(folder: Path) -> Iterator[None]:
    """Turns a disk-full error into one that names the checkpoint to resume from.

    Raises:
        TrainingError: the disk is full, or a limit on file sizes is reached.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = getattr(error, "errno", None) in DISK_FULL_ERRNOS
        if not full and not any(words in str(error) for words in DISK_FULL_WORDS):
            raise
        for checkpoint in checkpoints_in(folder / "checkpoints"):
            if not (checkpoint / MANIFEST_FILE).is_file():
                shutil.rmtree(checkpoint, ignore_errors=True)
        file = getattr(error, "filename", None) or folder
        # safetensors and torch name a line of their C++ or Rust source instead.
        reason = getattr(error, "strerror", None) or "the disk is full, or a limit on file sizes is reached"
        raise TrainingError(
            f"{file}: cannot be written: {reason}. Free some space, then {resume_hint(folder)}"
        ) from error


@contextmanager
def translate_lost_process(folder: Path) -> Iterator[None]:
    """Turns the error that a process gets when another one has died into one that says so.

    Raises:
        TrainingError: another process has died.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not any(words in str(error) for words in LOST_PROCESS_WORDS):
            raise
        reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise TrainingError(
            f"process {rank()} lost another process, which failed or was killed: {reason}; {resume_hint(folder)}"
        ) from error


def resume_hint(folder: Path) -> str:
    """Advice on how to continue a stopped run, and from which checkpoint."""
    checkpoint = newest_valid(folder / "checkpoints")
    if checkpoint is None:
        return "start again: no checkpoint had been saved yet"
    return f"resume after step {checkpoint.name.rpartition('-')[2]} with the same config and resume=auto"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
