"""Ctrl-C and SIGTERM end a run at any moment, with the code of the signal, and what was trained is in a checkpoint."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_hf.core.child_process import package_environment
from lora_hf.core.records import RECORD_FILE, RunRecord
from lora_hf.training.checkpoints import checkpoints_in
from tests.support.command_lines import ask
from tests.support.kills import small_config
from tests.support.waiting import LIMIT

STEPS = 4
SIGNALS = (signal.SIGINT, signal.SIGTERM)
BEFORE_TRAINING = {
    "reading the rows": "lora_hf.data.tasks.classification:TextClassification.load",
    "loading the base": "lora_hf.training.run:load_base",
    "adding the adapter": "lora_hf.training.run:inject_at",
    "encoding the rows": "lora_hf.training.run:encode",
    "making the Trainer": "lora_hf.training.run:training_arguments",
}
AFTER_TRAINING = {
    "taking the last logits": "lora_hf.training.trainer:RunTrainer.final_outputs",
    "scoring them": "lora_hf.training.run:score_outputs",
    "writing the adapter": "lora_hf.training.run:save_adapter",
    "drawing the curves": "lora_hf.training.run:draw_run",
}

# Runs `train` and sends itself a signal when it begins to import a module.
CHILD = """
import importlib.abc, os, signal, sys

class Sender(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(sys.argv[2]))

sys.meta_path.insert(0, Sender())
from lora_hf.cli.main import main
sys.exit(main(sys.argv[3:], verb="train"))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "a warm film,pos\na dull film,neg\n" * 8)
    sections = small_config(tmp_path / "out", max_steps=STEPS, batch_size=4).to_dict()
    sections["task"] |= {"name": "mine", "kind": "classification", "label_names": ["neg", "pos"]}
    sections["task"]["data_dir"] = str(tmp_path)
    sections["output"]["plots"] = True
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "recipe.yaml"


def signal_at(monkeypatch: pytest.MonkeyPatch, place: str, kind: signal.Signals) -> None:
    """Sends a signal whenever the function `module:name` is called, which then goes on."""
    module, _, names = place.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = names.split(".")
    for each in outer:
        owner = getattr(owner, each)
    original = getattr(owner, name)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        signal.raise_signal(kind)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("moment", BEFORE_TRAINING)
def test_before_training_it_stops_at_once_and_leaves_nothing(
    moment: str, kind: signal.Signals, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, BEFORE_TRAINING[moment], kind)
    handlers = [signal.getsignal(each) for each in SIGNALS]
    said = ask("train", "--config", recipe, code=128 + kind).stderr
    assert "Traceback" not in said
    assert not (recipe.parent / "out" / "run" / RECORD_FILE).exists()
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


@pytest.mark.parametrize("kind", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "moment", [pytest.param(each, marks=() if "writing" in each else pytest.mark.full) for each in AFTER_TRAINING]
)
def test_after_training_it_stops_at_once_and_the_run_goes_on_from_its_last_step(
    moment: str, kind: signal.Signals, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        signal_at(patched, AFTER_TRAINING[moment], kind)
        said = ask("train", "--config", recipe, code=128 + kind).stderr
    assert f"stopped by {kind.name}: resume after step {STEPS}" in said
    assert "--resume auto" in said
    folder = recipe.parent / "out" / "run"
    assert checkpoints_in(folder / "checkpoints")[0].name == f"checkpoint-{STEPS}"
    assert not (folder / RECORD_FILE).exists()
    ask("train", "--config", recipe, "--resume", "auto")
    assert RunRecord.load(folder / RECORD_FILE).metrics["validation"]


@pytest.mark.parametrize("kind", SIGNALS)
def test_while_libraries_are_imported_it_stops_at_once(kind: signal.Signals, recipe: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "torch", str(int(kind)), "--config", str(recipe)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=package_environment() | {"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 128 + kind, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_verb_that_does_not_train_stops_too(kind: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at(monkeypatch, "lora_hf.adapters.resolve:find_saved_model", kind)
    said = ask("predict", "--adapter", "nowhere", "--text", "a film", code=128 + kind).stderr
    assert len(said.splitlines()) == 1


IMPATIENT = """
import atexit, signal, sys
import lora_hf.cli.main as command
from lora_hf.adapters import resolve

def find(*arguments, **named):
    signal.raise_signal(signal.SIGTERM)

def reported(*arguments, original=command.with_flags):
    signal.raise_signal(signal.SIGINT)
    return original(*arguments)

resolve.find_saved_model, command.with_flags = find, reported
atexit.register(signal.raise_signal, signal.SIGINT)
sys.argv[1:] = ["--adapter", "a", "--text", "x"]
sys.exit(command.main(verb="predict"))
"""


def test_further_signals_while_it_ends_change_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT], capture_output=True, text=True, timeout=LIMIT, env=package_environment()
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "stopped by SIGTERM: run the same command again\n")
