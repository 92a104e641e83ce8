"""Checkpoints that are whole or not there: what is found, refused, gone back from, and kept."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from lora_hf.core.errors import TrainingError
from lora_hf.training.checkpoints import (
    MANIFEST,
    PARTIAL_DIR,
    STATE,
    checkpoints_in,
    delete_newer,
    finalize_checkpoint,
    find_damage,
    newest_valid,
    resume_hint,
    rotate_checkpoints,
    translate_disk_full,
)


def checkpoint(folder: Path, step: int, best: int | None = None) -> Path:
    written = folder / PARTIAL_DIR / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "weights").write_bytes(bytes([step]) * 100)
    state = {"best_global_step": best, "best_model_checkpoint": best and f"checkpoint-{best}"}
    (written / STATE).write_text(json.dumps(state))
    finalize_checkpoint(written, folder / written.name)
    return folder / written.name


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
        (STATE, cut, f"{STATE} has changed"),
        (MANIFEST, cut, "damaged"),
        (MANIFEST, Path.unlink, "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_gone_back_from(
    name: str, damage: object, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    assert newest_valid(tmp_path) == bad
    damage(bad / name)  # type: ignore[operator]
    assert message in find_damage(bad)
    assert newest_valid(tmp_path) == good
    assert "checkpoint-6 is damaged" in caplog.text
    assert "going back to the one before" in caplog.text


def test_a_checkpoint_needs_its_best_one(tmp_path: Path) -> None:
    first, best, newest = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6, best=6), checkpoint(tmp_path, 9, best=6)
    assert not find_damage(newest)
    cut(best / "weights")
    assert find_damage(newest).startswith("checkpoint-9 needs the best checkpoint so far, and checkpoint-6 is damaged")
    assert newest_valid(tmp_path) == first


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path: Path) -> None:
    old = checkpoint(tmp_path, 3)
    (old / "more").write_text("of the old one")
    assert checkpoint(tmp_path, 3) == old
    assert not find_damage(old)
    assert not (old / "more").exists()
    assert not list((tmp_path / PARTIAL_DIR).iterdir())


def test_what_is_kept(tmp_path: Path) -> None:
    def after(keep: int | None, best: str | None) -> list[str]:
        for step in (1, 2, 3, 4):
            checkpoint(tmp_path, step)
        rotate_checkpoints(tmp_path, keep, Path("elsewhere") / best if best else None)
        return [name.removeprefix("checkpoint-") for name in names(tmp_path)]

    assert after(None, None) == ["4", "3", "2", "1"]
    assert after(2, None) == ["4", "3"]
    assert after(2, "checkpoint-1") == ["4", "1"]
    assert after(3, "checkpoint-1") == ["4", "3", "1"]
    assert after(1, "checkpoint-2") == ["4", "2"], "the newest is for going on, the best for the end"


def test_a_run_that_goes_on_drops_what_came_after(tmp_path: Path) -> None:
    older, chosen, _ = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    (tmp_path / PARTIAL_DIR / "checkpoint-4").mkdir()
    delete_newer(chosen)
    assert checkpoints_in(tmp_path) == [chosen, older]
    assert not (tmp_path / PARTIAL_DIR).exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_is_one_message(error: Exception, tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoints", 12)
    words = r"cannot be written.*Free some space.*after step 12.*--resume auto"
    with pytest.raises(TrainingError, match=words), translate_disk_full(tmp_path):
        raise error


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    for error in (RuntimeError("a bug"), OSError(errno.EACCES, "Permission denied")):
        with pytest.raises(type(error)) as caught, translate_disk_full(tmp_path):
            raise error
        assert caught.value is error
    assert "no checkpoint had been saved yet" in resume_hint(tmp_path)
