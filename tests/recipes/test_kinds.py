"""Every kind of task of one's own in the verbs that take several runs, rows or processes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_hf.adapters.format import read_adapter
from lora_hf.core.records import RunRecord
from tests.support.chats import save_chat_model, taught_rows, write_rows
from tests.support.command_lines import REPO, ask, last_json
from tests.support.span_data import question, save_encoder_decoder, write_conll, write_copies, write_lines
from tests.support.waiting import LIMIT
from tests.tolerances import PROCESSES_FP32
from tools.benchmark.label_rows import LABELS, label_rows

pytestmark = pytest.mark.full

KINDS = ("chat", "multi_label", "tokens", "question_answering", "seq2seq")
MIXED = ("multi_label",)  # one batch may hold rows of several adapters
CONFIG = "own.yaml"
TRAIN = {"max_steps": 2, "batch_size": 4, "lr": 1e-3, "hf": {"optim": "sgd"}}


def write_data(kind: str, folder: Path) -> dict[str, Any]:
    """Writes rows of a kind, and returns the sections `model` and `task` of a config for them."""
    base, more = "tiny-roberta", {}
    for seed, split in enumerate(("train", "validation")):
        path = folder / "data" / f"{split}.jsonl"
        if kind == "chat":
            write_rows(path, taught_rows(8, seed))
        elif kind == "multi_label":
            write_lines(path, label_rows(8, seed))
            more = {"label_names": list(LABELS)}
        elif kind == "tokens":
            write_conll(path.with_suffix(".conll"), 8, seed)
            more = {"label_names": ["PER", "LOC", "ORG"]}
        elif kind == "question_answering":
            write_lines(path, [question(random.Random(8 * seed + row)) for row in range(8)])
        else:
            write_copies(path, 8, seed)
    if kind == "chat":
        base = str(save_chat_model(folder / "base"))
    elif kind == "seq2seq":
        base = str(save_encoder_decoder(folder / "base", "t5"))
    task = {"name": f"own-{kind}", "kind": kind, "data_dir": str(folder / "data"), "max_length": 256, **more}
    return {"model": {"name": base, "precision": "fp32"}, "task": task}


def write_config(kind: str, folder: Path) -> Path:
    file = folder / CONFIG
    file.write_text(yaml.safe_dump({**write_data(kind, folder), "train": TRAIN, "lora": {"targets": ["all"]}}))
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two run folders of each kind, `one` and `other`, by kind their parent."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        words = [
            "--config",
            write_config(kind, folder),
            f"output.dir={folder / 'runs'}",
            "output.plots=false",
            "output.name=one",
        ]
        ask("train", *words)
        ask("train", *words[:-1], "output.name=other", "train.seed=1")
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_compare(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    found = last_json(ask("compare", runs[kind] / "runs", "--output", tmp_path / "report", "--json"))
    assert (found["runs"], found["left_out"]) == (2, [])
    assert list(found["best"]) == [f"own-{kind}"]
    assert f"own-{kind}" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_push(kind: str, runs: dict[str, Path]) -> None:
    words = ["--adapter", runs[kind] / "runs/one/adapter", "--repo-id", "someone/own", "--dry-run", "--json"]
    pushed = last_json(ask("push", *words))
    assert {"adapter_config.json", "adapter_model.safetensors", "config.yaml", "README.md"} == set(pushed["files"])
    assert f"own-{kind}" in pushed["card"]
    assert str(runs[kind]) not in pushed["card"], "no path of this machine"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_adapters(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"adapter": name, "text": "the router restarts"} for name in ("one", "other")]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    adapters = [f"--adapter={name}={runs[kind] / 'runs' / name / 'adapter'}" for name in ("one", "other")]
    done = ask("predict", *adapters, "--input", file, "--json", code=0 if kind in MIXED else 2)
    if kind in MIXED:
        answers = last_json(done)["predictions"]
        assert [answer["adapter"] for answer in answers] == ["one", "other"]
        assert all(set(answer["probabilities"]) == set(LABELS) for answer in answers)
    else:
        (line,) = [line for line in done.stderr.splitlines() if "several adapters" in line]
        assert f"own-{kind}" in line


@pytest.fixture(scope="module")
def runs_of_two(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folder of each kind, trained as `one`, but by two processes."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "tests.support.quick_start",
        "tests.support.train_together",
        folder,
        *(runs[kind] / CONFIG for kind in KINDS),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return {kind: folder / runs[kind].name for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(kind: str, runs: dict[str, Path], runs_of_two: dict[str, Path]) -> None:
    folders = [runs[kind] / "runs/one", runs_of_two[kind]]
    one, two = (read_adapter(folder / "adapter").tensors for folder in folders)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < PROCESSES_FP32, name
    records = [RunRecord.load(folder / "record.json") for folder in folders]
    assert [record.machine["processes"] for record in records] == [1, 2]
    assert records[0].metrics["validation"].keys() == records[1].metrics["validation"].keys()
