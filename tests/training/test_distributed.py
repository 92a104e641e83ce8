"""Two processes against one: the same weights, scores and files, and one voice where they end early."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora_hf.adapters.format import read_adapter
from lora_hf.cli.main import main
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.records import RunRecord
from lora_hf.data.sampling import last_batch_share
from lora_hf.data.tasks.registry import get_task
from lora_hf.training import distributed as processes
from lora_hf.training import run as training
from lora_hf.training.arguments import training_arguments
from lora_hf.training.callbacks import SignalHandler
from lora_hf.training.checkpoints import MANIFEST_FILE, checkpoints_in, find_damage
from lora_hf.training.run import Run, train
from lora_hf.training.run_dir import LOCK_FILE
from lora_hf.training.trainer import Optimizations
from tests.support.distributed_runs import (
    DEVELOPMENT,
    FEW,
    NONE_LEFT,
    WITH_FSDP,
    by_length,
    classify,
    generate,
    rows_of,
)
from tests.support.kills import differences, small_config
from tests.support.waiting import LIMIT, wait_until
from tests.tolerances import BF16_LOSS_RTOL, PROCESSES_FP32

pytestmark = [pytest.mark.full, pytest.mark.minutes]

REPO = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*words: str) -> subprocess.Popen[str]:
    """Two processes, with this checkout's code."""
    command, environment = [sys.executable, *TORCHRUN, *words], os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of `tests/support/distributed_runs.py`."""
    folder = tmp_path_factory.mktemp("shared")
    process = start("-m", "tests.support.quick_start", "tests.support.distributed_runs", str(folder))
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def seen(shared: Path) -> list[dict[str, Any]]:
    """What each process saw."""
    return [json.loads((shared / f"seen-{place}.json").read_text()) for place in range(2)]


def run_in(folder: Path) -> Run:
    return Run(folder, RunRecord.load(folder / "record.json"))


def apart(one: Run, other: Run) -> float:
    """The largest difference of any two weights of the adapters, head included."""
    a, b = read_adapter(one.weights).tensors, read_adapter(other.weights).tensors
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def history(run: Run, key: str) -> list[float]:
    return [entry[key] for entry in run.record.history if key in entry]


def predictions(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "predictions-validation.jsonl").read_text().splitlines()]


def check_equal(two: Run, one: Run) -> None:
    assert apart(two, one) < PROCESSES_FP32
    assert two.record.metrics["validation"] == pytest.approx(one.record.metrics["validation"], rel=PROCESSES_FP32)
    assert two.record.best["step"] == one.record.best["step"]
    for key in ("loss", "eval_validation_loss", "learning_rate"):
        assert history(two, key) == pytest.approx(history(one, key), rel=PROCESSES_FP32, abs=PROCESSES_FP32), key


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_two_processes_train_and_score_as_one(shared: Path, tmp_path: Path) -> None:
    one, two = train(classify(tmp_path, "one"), rows=rows_of("rule-sentiment")), run_in(shared / "classify")
    check_equal(two, one)
    assert two.record.machine["processes"] == 2
    ours, theirs = predictions(two), predictions(one)
    assert [line["row"] for line in ours] == list(range(DEVELOPMENT)), "every row once, and in order"
    for key in ("label", "prediction"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    logits = [torch.tensor([line["logits"] for line in lines]) for lines in (ours, theirs)]
    assert torch.allclose(*logits, atol=PROCESSES_FP32, rtol=0)


def test_a_process_without_rows_in_the_last_batch_takes_no_part_in_it(shared: Path, tmp_path: Path) -> None:
    # With rows of like length together, which have an order of their own.
    one = train(by_length(tmp_path, "one"), rows=rows_of("rule-sentiment", NONE_LEFT))
    check_equal(run_in(shared / "by_length"), one)
    assert apart(run_in(shared / "filled_up"), one) > 10 * PROCESSES_FP32, "rows that count twice show"


def test_a_language_model_divides_by_the_labels_of_all_processes(shared: Path, tmp_path: Path) -> None:
    check_equal(run_in(shared / "generate"), train(generate(tmp_path, "generate"), rows=rows_of("rule-restaurants")))


def test_a_base_in_bf16_trains_in_two_processes(shared: Path, tmp_path: Path) -> None:
    two = run_in(shared / "generate_bf16")
    one = train(generate(tmp_path, "bf16", precision="bf16"), rows=rows_of("rule-restaurants", *FEW))
    assert history(two, "loss") == pytest.approx(history(one, "loss"), rel=BF16_LOSS_RTOL)
    assert {tensor.dtype for tensor in read_adapter(two.weights).tensors.values()} == {torch.float32}


@pytest.mark.skipif(not WITH_FSDP, reason="this accelerate does not have all of FSDP2")
def test_fsdp_deals_out_the_frozen_base_alone_and_changes_nothing(shared: Path, seen: list[dict[str, Any]]) -> None:
    for each in seen:
        assert all(each["sharded"])
        assert each["not whole"]
        assert not any(each["not whole"])
        assert "train.method=full: FSDP shards a frozen base" in each["refused full"]
    check_equal(run_in(shared / "fsdp"), run_in(shared / "by_length"))
    files = [
        {file.name for file in checkpoints_in(shared / name / "checkpoints")[0].iterdir()}
        for name in ("fsdp", "by_length")
    ]
    assert files[0] == files[1]


def test_dropout_is_each_process_own(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["mask"] != seen[1]["mask"]
    assert 0.8 < sum(seen[1]["mask"]) / len(seen[1]["mask"]) < 1


def test_a_signal_to_one_process_stops_both_and_they_go_on(shared: Path, seen: list[dict[str, Any]]) -> None:
    assert {each["stopped"] for each in seen} == {"SIGTERM: resume after step 5 with the same config and resume=auto"}
    with pytest.raises(ConfigError, match=r"expected as many processes as wrote it, 2, found 1; start 2"):
        train(small_config(shared, batch_size=4), resume=str(checkpoints_in(shared / "stopped/run/checkpoints")[0]))
    # To the last bit, the generators of both processes included.
    assert not differences(run_in(shared / "whole" / "run"), shared / "stopped" / "run")
    last = checkpoints_in(shared / "stopped" / "run" / "checkpoints")[0]
    assert {file.name for file in last.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_both_processes_return_the_run_that_the_first_wrote(shared: Path, seen: list[dict[str, Any]]) -> None:
    assert seen[0]["classify"] == seen[1]["classify"]
    folder = Path(seen[1]["classify"]["folder"])
    assert seen[1]["classify"]["metrics"] == RunRecord.load(folder / "record.json").metrics
    files = {path.name for path in folder.iterdir()}
    written = {"config.yaml", "adapter", "record.json", "predictions-validation.jsonl", "log.jsonl"}
    assert files == written | {"checkpoints", LOCK_FILE}
    checkpoints = folder / "checkpoints"
    assert all((each / MANIFEST_FILE).exists() for each in checkpoints_in(checkpoints))
    assert not [find_damage(checkpoint) for checkpoint in checkpoints_in(checkpoints) if find_damage(checkpoint)]
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, len(steps) + 1)), "each step is logged once"


def test_a_loss_that_is_no_number_in_one_process_ends_both_with_its_rows(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["no number"] == seen[1]["no number"]
    message = seen[0]["no number"]
    assert "the loss is nan at step 3:" in message
    assert message.endswith("checkpoint-2")
    assert len(re.findall(r"\d+(?=,| \()", message.split("examples ")[1])) == 4


def test_what_one_process_decides_all_hear(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        assert each["largest"] == 6
        assert each["from_one"] == [1]
        assert each["refused"] == "process 0 refuses"
        assert "holds a finished run" in each["again"]


def test_a_killed_process_ends_the_other_with_one_message(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_config(tmp_path, epochs=10_000, batch_size=4).to_dict()))
    process = start("scripts/train.py", "--config", str(recipe))
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_until(lambda: process.poll() is not None or list(checkpoints.glob(f"*/{MANIFEST_FILE}")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("this system does not tell the processes of a process")
    ranks = [
        int(child)
        for child in children.read_text().split()
        if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()
    ]
    os.kill(ranks[0], signal.SIGKILL)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert len(re.findall(r"^error: process 0 lost another process", said, re.M)) == 1, said
    assert re.search(r"resume after step \d+ .*--resume auto", said)
    assert said.count("Traceback") <= 1, "torchrun has one of its own; we have none"
    assert not (checkpoints.parent / "record.json").exists()


@pytest.mark.parametrize(
    ("others", "error", "ignored"),
    [(1, RuntimeError, True), (1, ConfigError, False), (0, RuntimeError, False)],
)
def test_who_has_lost_another_says_so_before_it_is_ended(
    others: int, error: type[Exception], ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sends SIGTERM to those left as soon as one has failed."""
    monkeypatch.setenv("WORLD_SIZE", str(1 + others))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(error, match="lost"), SignalHandler(tmp_path):
            raise error("lost")
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if ignored else before)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_has_lost_another_process_is_not_ended_before_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own error says so, in which the handler of signals must still know the one of torch."""

    def lose(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(training, "find_run", lambda config, resume: (config, tmp_path, None))
    monkeypatch.setattr(training, "task_of", lose)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(TrainingError, match="lost another process"):
            training.train(small_config(tmp_path))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_mistake_is_told_once_and_only_training_is_shared(tmp_path: Path) -> None:
    process = start("scripts/eval.py", "--adapter", str(tmp_path))
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert len(re.findall(r"^error: eval: expected one process, found 2", said, re.M)) == 1, said
    traceback = said.split("Traceback")[-1].replace(str(REPO), "")  # a clone may be called lora_hf
    assert "lora_hf" not in traceback.replace("error: ", "")


@pytest.mark.parametrize("verb", ["sweep", "compare", "benchmark", "merge", "push", "predict"])
def test_verbs_that_are_not_shared_refuse(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("lora_hf.cli.main.claim_error_report", lambda: True)
    words = {
        "sweep": ["--config", "x", "--trials", "1", "train.lr=1e-4..1e-3"],
        "compare": ["x", "--output", "y"],
        "benchmark": ["glue"],
        "merge": ["--adapter", "x", "--output", "y"],
        "push": ["--adapter", "x", "--repo-id", "u/n"],
        "predict": ["--adapter", "x", "--text", "y"],
    }[verb]
    assert main([verb, *words]) == 2
    assert f"{verb}: expected one process, found 4 (WORLD_SIZE)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (48, [(8, 1.0), (8, 1.0)]),  # nothing is left over
        (54, [(6, 2.0), (0, 0.0)]),
        (60, [(8, 8 * 2 / 12), (4, 4 * 2 / 12)]),
        (3, [(3, 2.0), (0, 0.0)]),
    ],
)
def test_the_rows_of_the_last_batch_count_once(rows: int, expected: list[tuple[int, float]]) -> None:
    assert [last_batch_share(rows, 8, 2, place) for place in range(2)] == [
        (own, pytest.approx(share)) for own, share in expected
    ]


def test_a_config_says_how_a_process_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.from_dict({"train": {"seed": 7, "batch_size": 4}})
    # A process has one GPU, however many it sees: the Trainer would copy the model and multiply the batch size.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = training_arguments(config, get_task("rule-sentiment"), tmp_path, Optimizations(False, None))
    assert arguments.n_gpu <= 1
    assert arguments.train_batch_size == 4
    assert arguments.ddp_find_unused_parameters is False
    assert (arguments.seed, arguments.data_seed) == (7, 7)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_accelerate_reads_the_ready_configs(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(REPO / "configs" / "accelerate" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[name]
    assert config.distributed_type.value == kind
    assert config.mixed_precision == "no"
    assert bool(config.fsdp_config) == (name == "fsdp2")
    assert bool(config.deepspeed_config) == (name == "deepspeed_zero2")


def test_one_process_needs_nobody() -> None:
    assert processes.world_size() == 1
    assert processes.init_processes() == 1
    assert processes.all_reduce_max(3) == 3
    assert processes.run_on_rank(lambda: "x") == "x"
    assert processes.claim_error_report()
