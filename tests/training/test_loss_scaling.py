"""A frozen base in fp16, on the CPU: gradients that would vanish or overflow, and the steps that are left out."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, Interrupted, TrainingError
from lora_hf.core.records import RunRecord
from lora_hf.training import loss_scaling
from lora_hf.training.run import Run, train
from lora_hf.training.trainer import AdapterTrainer
from tests.support.kills import differences, small_config, small_rows
from tests.tolerances import FP16_LOSS_RTOL
from tests.training.test_survival import stop_at

pytestmark = pytest.mark.full

HIGH = 2.0**25  # a first scale at which the gradients of a few steps overflow, until it is halved often enough


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return small_rows()


def fp16(folder: Path, precision: str = "fp16", lora: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    sections = small_config(folder, **{"epochs": 1, "hf": {"logging_steps": 1}, **more}).to_dict()
    sections["model"]["precision"] = precision
    sections["lora"] |= {"lora_dropout": 0.0, **(lora or {})}
    return RunConfig.from_dict(sections)


@pytest.fixture(scope="module")
def overflowing(rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scaling, "FIRST_SCALE", HIGH)
        return train(fp16(tmp_path_factory.mktemp("overflowing")), rows=rows)


@pytest.mark.parametrize(("lora", "clipping"), [({}, 0.5), ({"bias": "all", "use_dora": True}, 0)])
def test_a_run_in_fp16_learns_as_one_in_fp32(
    lora: dict[str, Any], clipping: float, rows: dict[str, Any], tmp_path: Path
) -> None:
    """The norm of its gradients is that of the unscaled ones, whether they are clipped or not."""
    half, full = (
        train(fp16(tmp_path / name, name, lora, max_steps=4, max_grad_norm=clipping), rows=rows)
        for name in ("fp16", "fp32")
    )
    for key in ("loss", "grad_norm"):
        found, wanted = ([entry[key] for entry in run.record.history if key in entry] for run in (half, full))
        assert len(found) == 4
        assert found == pytest.approx(wanted, rel=FP16_LOSS_RTOL)
    assert half.record.skipped_steps == 0


def lose(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Has runs train on another loss."""
    computed = AdapterTrainer.compute_loss

    def changed(self: AdapterTrainer, model: Any, *rest: Any, **named: Any) -> Any:
        found = computed(self, model, *rest, **named)
        return change(found) if model.training else found

    monkeypatch.setattr(AdapterTrainer, "compute_loss", changed)


@pytest.mark.parametrize("scaled", [True, False])
def test_small_gradients_survive_because_the_loss_is_scaled(
    scaled: bool, rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch, lambda loss: loss * 1e-6)  # its gradients lie below what fp16 holds
    if scaled:
        assert train(fp16(tmp_path, max_steps=2), rows=rows).record.skipped_steps == 0
        return
    monkeypatch.setattr(loss_scaling.LossScaling, "on_pre_optimizer_step", lambda *_, **__: None)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: None)
    with pytest.raises(TrainingError, match="every lora_B is unchanged"):
        train(fp16(tmp_path, max_steps=2), rows=rows)


def test_a_step_that_overflows_is_left_out_counted_and_told(
    rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(loss_scaling, "FIRST_SCALE", HIGH)
    found: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append(kwargs["lr_scheduler"].get_last_lr()[0])
            named = kwargs["model"].named_parameters()
            found.append({name: value.detach().clone() for name, value in named if value.requires_grad})

    rates: list[float] = []
    run = train(fp16(tmp_path, schedule="linear", warmup_steps=0), rows=rows, callbacks=[Watch()])
    skipped = run.record.skipped_steps
    left_out = {int(step) for step in re.findall(r"step (\d+) is skipped", caplog.text)}
    assert {1, 2} <= left_out < set(range(1, 8 + 1))
    assert len(left_out) == skipped
    assert any(f"{skipped} of 8 steps were skipped" in warning for warning in run.record.warnings)
    assert f"the new loss scale is {HIGH / 2:g}" in caplog.text
    same = [all(torch.equal(a[key], b[key]) for key in a) for a, b in pairwise(found)]
    assert same == [step in left_out for step in range(2, 8 + 1)], "nothing was learned from them, but from the others"
    taken = [sum(each not in left_out for each in range(1, step + 1)) for step in range(1, 8 + 1)]
    assert rates == pytest.approx([1e-3 * (1 - steps / 8) for steps in taken]), "the schedule waits"


def test_what_is_written_of_an_overflow_is_json(overflowing: Run) -> None:
    """The norm of such a gradient is no number, for which JSON has no word."""

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    lines = (overflowing.folder / "log.jsonl").read_text().splitlines()
    for text in ((overflowing.folder / "record.json").read_text(), *lines):
        json.loads(text, parse_constant=refuse)
    norms = [entry["grad_norm"] for entry in overflowing.record.history if "grad_norm" in entry]
    assert len(norms) == 8 - overflowing.record.skipped_steps
    assert RunRecord.load(overflowing.folder / "record.json") == overflowing.record


def test_a_run_that_only_lacks_its_record_keeps_its_count(
    rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scaling, "FIRST_SCALE", HIGH)
    run = train(fp16(tmp_path), rows=rows)
    assert run.record.skipped_steps > 0
    (run.folder / "record.json").unlink()
    again = train(fp16(tmp_path), resume="auto", rows=rows).record
    assert again.skipped_steps == run.record.skipped_steps
    assert again.warnings == run.record.warnings


def test_a_run_that_goes_on_has_its_scale_and_its_count(
    overflowing: Run, rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scaling, "FIRST_SCALE", HIGH)
    with pytest.raises(Interrupted):
        train(fp16(tmp_path), rows=rows, callbacks=[stop_at(3, signal.SIGINT)])
    resumed = train(fp16(tmp_path), resume="auto", rows=rows)
    assert not differences(overflowing, resumed.folder)
    assert resumed.record.skipped_steps == overflowing.record.skipped_steps


@pytest.mark.parametrize("always", [True, False])
def test_a_run_that_no_scale_helps_ends(
    always: bool, rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A number whose gradient is none.
    lose(monkeypatch, lambda loss: loss + (loss - loss.detach()).abs().sqrt() * 0)
    steps = {"epochs": 9} if always else {"max_steps": 3}
    message = "at any loss scale" if always else "all 3 steps were skipped"
    with pytest.raises(TrainingError, match=message):
        train(fp16(tmp_path, **steps), rows=rows)
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is computed as asked")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hf": {"fp16": True}}, r"train\.hf\.fp16: needs a GPU"),
        ({"method": "full"}, r"model\.precision=fp16 with train\.method=full: needs a GPU"),
    ],
)
def test_autocast_to_fp16_without_a_gpu_is_refused(
    more: dict[str, Any], message: str, rows: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(fp16(tmp_path, **more), rows=rows)
    assert not list(tmp_path.iterdir())


def test_other_precisions_are_not_scaled(rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: pytest.fail("nothing is fp16"))
    run = train(fp16(tmp_path, "bf16", max_steps=2), rows=rows)
    assert not (run.folder / "checkpoints" / "checkpoint-2" / "scaler.pt").exists()
