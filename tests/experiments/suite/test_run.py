"""Small suites: tasks of a few rows, two optimizer steps per run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from lora_hf.cli.main import main
from lora_hf.experiments.suite import run as suite_run
from lora_hf.experiments.suite.plan import PlannedRun
from tests.support.processes import processes_with
from tests.support.waiting import wait_until

REPO = Path(__file__).parents[3]
SHORT = ["train.max_steps=2", "train.batch_size=4", "task.max_length=16"]
CONFIG = ["--config", "tiny_glue_qv8.yaml"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNLI and RTE of twelve rows a split."""
    folder = tmp_path_factory.mktemp("data")
    labels = [0, 1, 2] * 4
    for split in ("train", "validation_matched", "validation_mismatched"):
        write(folder / "glue" / "mnli" / f"{split}.parquet", ("premise", "hypothesis"), labels)
    for split in ("train", "validation"):
        write(folder / "glue" / "rte" / f"{split}.parquet", ("sentence1", "sentence2"), [label % 2 for label in labels])
    return folder


def write(file: Path, columns: tuple[str, str], labels: list[int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = {column: [f"{column} says {row}" for row in range(len(labels))] for column in columns}
    Dataset.from_dict({**texts, "label": labels, "idx": list(range(len(labels)))}).to_parquet(file)


def words(data: Path, output: Path, tasks: str, *more: str) -> list[str]:
    """A command; all of its overrides stand together, as argparse wants them."""
    options = [word for word in more if "=" not in word]
    overrides = [word for word in more if "=" in word]
    return [
        "glue",
        "--data-dir",
        str(data),
        "--output",
        str(output),
        "--tasks",
        tasks,
        *CONFIG,
        *options,
        *SHORT,
        *overrides,
    ]


@contextmanager
def runs_in_this_process() -> Iterator[None]:
    """A suite's runs take place here, where torch is imported already, one after the other."""

    def start(_: object, run: PlannedRun, words: list[str], jobs: int) -> SimpleNamespace:
        file = run.folder / suite_run.MESSAGES_FILE
        with file.open("a", encoding="utf-8") as messages, redirect_stdout(messages), redirect_stderr(messages):
            code = main(words)
        return SimpleNamespace(returncode=code, poll=lambda: code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_run, "_start", start)
        yield


@pytest.fixture
def in_this_process() -> Iterator[None]:
    with runs_in_this_process():
        yield


@pytest.fixture(scope="module")
def suite(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A finished suite in which RTE starts from MNLI, which has another seed: its words and its folder."""
    output = tmp_path_factory.mktemp("suite") / "here"
    said = words(data, output, "rte,mnli", "--from-mnli", "--jobs", "2", "rte:seeds=1", "rte:train.lr=2e-3")
    with runs_in_this_process():
        assert main(said, verb="benchmark") == 0
    return said, output


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "suite.json").read_text(encoding="utf-8"))


def test_every_run_is_in_the_record_as_its_own_record_says(suite: tuple[list[str], Path]) -> None:
    _, output = suite
    record = record_of(output)
    names = ["mnli-tiny_glue_qv8-seed0", "rte-tiny_glue_qv8-seed1"]
    assert [run["folder"] for run in record["runs"]] == names
    assert (record["planned"], record["jobs"], record["failures"]) == (2, 2, {})
    assert record["rows"]["mnli"] == {"train": 12, "validation_matched": 12, "validation_mismatched": 12}
    weights = REPO / "lora_hf" / "models" / "bases" / "tiny-roberta" / "model.safetensors"
    assert record["base"] == {"name": "tiny-roberta", "bytes": weights.stat().st_size}
    for run in record["runs"]:
        own = json.loads((output / run["folder"] / "record.json").read_text(encoding="utf-8"))
        for key in ("metrics", "majority", "parameters", "timings", "throughput", "memory", "files", "seed"):
            assert run[key] == own[key]
        assert run["threads"] == 1  # the suite's tests have one core a process
        scores = [scores["accuracy"] for scores in own["metrics"].values()]
        assert run["value"] == pytest.approx(sum(scores) / len(scores))  # MNLI's two parts have as many rows here
        assert sum(run["files"].values()) == sum(
            file.stat().st_size for file in (output / run["folder"] / "adapter").iterdir()
        )
        assert not (output / run["folder"] / "checkpoints").exists()
    assert record["configurations"]["tiny_glue_qv8"]["rte"]["train"]["lr"] == 2e-3
    assert record["configurations"]["tiny_glue_qv8"]["mnli"]["train"]["lr"] == 1e-3
    assert record["published"]["rte"]["tiny_glue_qv8"] == {"why_not": "other base"}
    assert str(output) not in (output / "suite.json").read_text(encoding="utf-8")
    assert all((output / name).stat().st_size for name in ("scores.png", "parameters.png", "time.png"))


def test_rte_starts_from_the_mnli_adapter(suite: tuple[list[str], Path]) -> None:
    _, output = suite
    own = json.loads((output / "rte-tiny_glue_qv8-seed1" / "record.json").read_text(encoding="utf-8"))
    assert own["config"]["train"]["start_from"] == str(output / "mnli-tiny_glue_qv8-seed0" / "adapter")
    assert [run["starts_from"] for run in record_of(output)["runs"]] == [None, "mnli-tiny_glue_qv8-seed0"]


@pytest.mark.full
def test_a_second_call_runs_only_what_is_missing(
    suite: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The one run that is missing has a process of its own, as outside the tests."""
    said, output = suite
    files = {name: output / name / "record.json" for name in (run["folder"] for run in record_of(output)["runs"])}
    before = {name: file.read_bytes() for name, file in files.items()}
    assert main([said[0], "--json", *said[1:]], verb="benchmark") == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: file.read_bytes() for name, file in files.items()} == before
    assert [run["folder"] for run in shown["runs"]] == list(files)

    lost = "rte-tiny_glue_qv8-seed1"
    files[lost].unlink()
    assert main(said, verb="benchmark") == 0
    after = {name: file.read_bytes() for name, file in files.items()}
    assert [name for name in files if after[name] != before[name]] == [lost]
    scores = [json.loads(version[lost])["metrics"] for version in (before, after)]
    assert scores[0] == scores[1]


def test_a_folder_with_a_run_of_another_config_is_refused(
    suite: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said, output = suite
    before = (output / "suite.json").read_bytes()
    assert main([*said, "mnli:train.lr=0.5"], verb="benchmark") == 2
    error = capsys.readouterr().err
    assert "mnli-tiny_glue_qv8-seed0: contains a run with another config: train.lr is 0.001" in error
    assert (output / "suite.json").read_bytes() == before


@pytest.mark.full
@pytest.mark.usefixtures("in_this_process")
def test_one_failure_stops_only_what_needs_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = "mnli:lora.targets=[no.such]"
    said = words(data, tmp_path, "rule-sentiment,rte,mnli", "--from-mnli", "--jobs", "2", "--json", broken)
    assert main(said, verb="benchmark") == 2
    out, error = capsys.readouterr()
    assert "2 of 3 runs failed" in error
    record = json.loads(out.splitlines()[-1])
    assert [run["task"] for run in record["runs"]] == ["rule-sentiment"]
    assert "no.such" in record["failures"]["mnli-tiny_glue_qv8-seed0"]
    assert "mnli-tiny_glue_qv8-seed0" in record["failures"]["rte-tiny_glue_qv8-seed0"]
    assert not (tmp_path / "rte-tiny_glue_qv8-seed0" / "record.json").exists()


@pytest.mark.full
@pytest.mark.usefixtures("without_java", "in_this_process")
def test_texts_are_written_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["nlg", "--tasks", "rule-restaurants", "--config", "rule_restaurants.yaml", "--output", str(tmp_path)]
    short = ["train.max_steps=2", "generate.max_new_tokens=3", "generate.num_beams=1", "--json"]
    assert main([*said, *short], verb="benchmark") == 0
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    scored = json.loads((tmp_path / run["folder"] / "scores-test.json").read_text(encoding="utf-8"))
    assert (run["metric"], run["value"]) == ("BLEU", scored["metrics"]["all"]["BLEU"])
    assert run["texts"]["metrics"] == scored["metrics"]
    assert run["rows"]["test"] == scored["inputs"] == 40  # of five references each


@pytest.mark.full
def test_an_interruption_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/benchmark.py", "glue", "--tasks", "rule-sentiment", *CONFIG]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "here"), "--jobs", "2", "--seeds", "0,1", "train.epochs=10000"],
        cwd=REPO, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(REPO)},
    )  # fmt: skip
    wait_until(lambda: len(processes_with(str(tmp_path))) >= 3 or process.poll() is not None)  # the suite and two runs
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "stopped by SIGTERM" in error
    assert not processes_with(str(tmp_path))


def test_errors_of_the_whole_suite_are_raised_before_the_first_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "none"
    for more, message in (
        (["rte,sst3"], "unknown task 'sst3' (did you mean 'sst2'?)"),
        (["rte,cola,sst2"], "the data of 2 of 3 tasks cannot be used:"),
        (["--seeds", "0,0"], "--seeds 0,0: expected different whole numbers"),
        (["rte:seeds=one"], "found 'one'"),
        (["cola:train.lr=1"], "'cola' is not one of the tasks or configurations"),
        (["rte:tiny_glue_qv:train.lr=1"], "(did you mean 'tiny_glue_qv8'?)"),
        (["rte:rte:train.lr=1"], "expected [TASK:][CONFIGURATION:]key=value"),
        (["tiny_glue_qv8:seeds=0,1"], "all configurations of a task share its seeds"),
        (["train.seed=3"], "the suite sets train.seed itself"),
        (["lora.rr=3"], "lora.rr: unknown key"),
        (["--from-mnli"], "add mnli to the tasks"),
        (["--jobs", "0"], "jobs: expected a whole number >= 1, found 0"),
        (["--config", "./configs/tiny_glue_qv8.yaml"], "expected different file names"),
        (["--model", "no-such/base"], "no-such/base"),
        (["--config", "rule_restaurants.yaml"], "found tiny-gpt2, tiny-roberta"),
    ):
        tasks, more = (more[0], more[1:]) if more[0].startswith("rte,") else ("rte", more)
        assert main(words(data, output, tasks, *more), verb="benchmark") == 2, (tasks, more)
        assert message in capsys.readouterr().err
        assert not output.exists()


def test_the_narrowest_override_wins(tmp_path: Path) -> None:
    from lora_hf.experiments.suite.plan import SuiteOptions, plan_suite

    configs = ("tiny_glue_qv8.yaml", "tiny_glue_full.yaml")
    overrides = ("cola:tiny_glue_full:train.lr=4", "cola:train.lr=2", "tiny_glue_full:train.lr=3", "train.lr=1")
    runs = plan_suite(SuiteOptions(("cola", "rte"), tmp_path, configs=configs, overrides=overrides))
    assert {(run.task, run.configuration): run.config.train.lr for run in runs} == {
        ("cola", "tiny_glue_qv8"): 2, ("cola", "tiny_glue_full"): 4,
        ("rte", "tiny_glue_qv8"): 1, ("rte", "tiny_glue_full"): 3,
    }  # fmt: skip


def test_without_configs_every_task_has_its_published_recipe(data: Path, tmp_path: Path) -> None:
    from lora_hf.experiments.suite.plan import SuiteOptions, plan_suite

    ours = plan_suite(SuiteOptions(("cola", "rte"), tmp_path, model="tiny-roberta"))
    assert [(run.config.model.name, run.config.train.epochs, run.configuration) for run in ours] == [
        ("tiny-roberta", 80, "recipe"),
        ("tiny-roberta", 80, "recipe"),
    ]
    large = plan_suite(SuiteOptions(("cola", "rte"), tmp_path, model="roberta-large", seeds=(3, 4)))
    assert [(run.config.train.lr, run.config.train.seed) for run in large] == [
        (2e-4, 3), (4e-4, 3), (2e-4, 4), (4e-4, 4),
    ]  # fmt: skip
