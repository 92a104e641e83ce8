"""Checkpoints: which ones are found, refused, passed over, deleted and kept."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from lora_hf.core.errors import TrainingError
from lora_hf.training import checkpoints
from lora_hf.training.checkpoints import (
    MANIFEST_FILE,
    PROGRESS_FILE,
    STATE_FILE,
    checkpoints_in,
    delete_newer,
    find_damage,
    newest_valid,
    read_progress,
    reopen,
    resume_hint,
    rotate_checkpoints,
    sha256,
    translate_disk_full,
    write_manifest,
    write_progress,
)


def checkpoint(folder: Path, step: int, best: int | None = None, complete: bool = True) -> Path:
    written = folder / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "weights").write_bytes(bytes([step]) * 100)
    state = {"best_global_step": best, "best_model_checkpoint": best and f"checkpoint-{best}"}
    (written / STATE_FILE).write_text(json.dumps(state))
    if complete:
        write_manifest(written)
    return written


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder)]


def test_checkpoints_are_found_by_step_and_nothing_else_is_one(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200").write_text("a file")
    (tmp_path / "checkpoint-old").mkdir()
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert checkpoints_in(tmp_path / "nowhere") == []
    assert newest_valid(tmp_path) == tmp_path / "checkpoint-100"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("weights", cut, "weights has changed"),
        ("weights", flip, "weights has changed"),
        ("weights", Path.unlink, "weights is missing"),
        (STATE_FILE, cut, f"{STATE_FILE} has changed"),
        (MANIFEST_FILE, cut, "damaged"),
        (MANIFEST_FILE, Path.unlink, "incomplete"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    name: str, damage: object, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    assert newest_valid(tmp_path) == bad
    damage(bad / name)  # type: ignore[operator]
    assert message in find_damage(bad)
    assert newest_valid(tmp_path) == good
    assert find_damage(bad) in caplog.text


def test_a_checkpoint_needs_its_best_one(tmp_path: Path) -> None:
    first, best, newest = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6, best=6), checkpoint(tmp_path, 9, best=6)
    assert not find_damage(newest)
    cut(best / "weights")
    damage = find_damage(newest)
    assert damage.startswith("checkpoint-9 needs the best checkpoint")
    assert "checkpoint-6 is damaged" in damage
    assert newest_valid(tmp_path) == first


def test_old_checkpoints_are_deleted_but_for_the_newest_and_the_best(tmp_path: Path) -> None:
    def after(keep: int | None, best: int | None) -> list[str]:
        folder = tmp_path / f"{keep} {best}"
        for step in (1, 2, 3, 4):
            checkpoint(folder, step)
        rotate_checkpoints(folder, keep, best)
        return [name.removeprefix("checkpoint-") for name in names(folder)]

    assert after(None, None) == ["4", "3", "2", "1"]
    assert after(2, None) == ["4", "3"]
    assert after(2, 1) == ["4", "1"]
    assert after(3, 1) == ["4", "3", "1"]
    assert after(1, 2) == ["4", "2"], "the newest is to resume from, the best for the end"


def test_a_reopened_checkpoint_is_complete_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights may be gigabytes, and the run may die while they are read."""
    written = checkpoint(tmp_path, 3, complete=False)
    write_progress(written, {"finished": True})
    write_manifest(written)
    read: list[str] = []

    def watched(file: Path) -> str:
        assert (written / MANIFEST_FILE).is_file()
        read.append(file.name)
        return sha256(file)

    monkeypatch.setattr(checkpoints, "sha256", watched)
    reopen(written)
    assert read == [PROGRESS_FILE]
    assert not find_damage(written)
    assert read_progress(written) == {"finished": False}


def test_a_resumed_run_deletes_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    older, chosen, _ = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    checkpoint(tmp_path, 4, complete=False)
    delete_newer(chosen)
    assert checkpoints_in(tmp_path) == [chosen, older]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_is_one_message(error: Exception, tmp_path: Path) -> None:
    complete = checkpoint(tmp_path / "checkpoints", 12)
    checkpoint(tmp_path / "checkpoints", 13, complete=False)
    words = r"cannot be written.*Free some space.*after step 12.*resume=auto"
    with pytest.raises(TrainingError, match=words), translate_disk_full(tmp_path):
        raise error
    assert checkpoints_in(complete.parent) == [complete], "the incomplete one makes room"


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    for error in (RuntimeError("a bug"), OSError(errno.EACCES, "Permission denied")):
        with pytest.raises(type(error)) as caught, translate_disk_full(tmp_path):
            raise error
        assert caught.value is error
    assert "no checkpoint had been saved yet" in resume_hint(tmp_path)
