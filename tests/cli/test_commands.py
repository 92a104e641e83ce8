"""The command lines that people type, on the embedded base and data; some as processes, the others in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_hf.cli.main import main as cli
from lora_hf.core.records import RunRecord
from tests.support.command_lines import REPO, ask, last_json, run

QUICK = ["train.max_steps=12", "train.warmup_steps=2"]


@pytest.mark.parametrize("script", sorted(file.stem for file in (REPO / "scripts").glob("*.py")))
def test_every_script_is_its_verb(script: str) -> None:
    assert run(script, "--help").stdout.startswith(f"usage: python scripts/{script}.py ")


@pytest.mark.parametrize(
    ("words", "verb", "said"),
    [
        (["--config", "rule_sentiment.yaml", "--confg"], "train", "usage: python scripts/train.py [-h] --config"),
        (["train", "--nothing"], "benchmark", "usage: python scripts/benchmark.py [-h]"),
        (["joint", "--help"], "benchmark", "usage: python scripts/benchmark.py joint [-h]"),
        (["train", "--config", "rule_sentiment.yaml", "--confg"], None, "usage: lora-hf train [-h] --config"),
        ([], None, "usage: lora-hf [-h] VERB"),
    ],
)
def test_a_wrong_line_is_told_how_to_type_it(
    words: list[str], verb: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words, verb=verb)
    told = capsys.readouterr()
    assert (told.out + told.err).startswith(said)
    assert ended.value.code == (0 if "--help" in words else 2)


def test_without_a_verb_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([])
    assert "  sweep " in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("outputs")
    done = run("train", "--config", "rule_sentiment.yaml", *QUICK, f"output.dir={folder}", "--json")
    assert len(done.stdout.splitlines()) == 1, "standard output belongs to the result"
    assert "validation_accuracy" in done.stderr
    return last_json(done)


def test_train_then_eval_then_predict(trained: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(trained["run"])
    assert folder.name.startswith("rule-sentiment-tiny-roberta-lora-")
    record = RunRecord.load(folder / "record.json")
    assert record.metrics == trained["metrics"]
    scored = last_json(ask("eval", "--adapter", folder / "adapter", "--json"))
    assert scored["metrics"] == trained["metrics"]
    answer = json.loads(
        ask("predict", "--adapter", folder / "adapter", "--text", "A moving, funny and wise film.").stdout
    )
    assert answer["label"] in ("negative", "positive")
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-3)

    (tmp_path / "in.txt").write_text("A dull film.\nA moving, funny and wise film.\n")
    ask("predict", "--adapter", folder / "adapter", "--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["sentence"] for line in lines] == ["A dull film.", "A moving, funny and wise film."]
    assert lines[1]["probabilities"] == pytest.approx(answer["probabilities"], abs=2e-4)


def test_a_copied_adapter_needs_no_run_folder(trained: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in Path(trained["weights"]).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert last_json(ask("eval", "--adapter", copy, "--json"))["metrics"] == trained["metrics"]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown key": (["lora.rank=3"], "lora.rank: unknown key"),
    "mistyped key": (["train.batchsize=3"], "train.batchsize: unknown key (did you mean 'batch_size'?)"),
    "negative rate": (["train.lr=-1"], "train.lr: expected a number > 0, found -1"),
    "wrong type": (["lora.r=many"], "lora.r: expected a whole number >= 1, found 'many'"),
    "unknown task": (["task.name=sst3"], "unknown task 'sst3' (did you mean 'sst2'?)"),
    "missing data folder": (["task.name=sst2", "task.data_dir=nowhere"], "task.data_dir=nowhere is not a folder"),
    "unknown model": (["model.name=tiny-robert"], "no such model or folder (did you mean 'tiny-roberta'?)"),
    "missing model folder": (["model.name=./nowhere"], "./nowhere: no such folder"),
    "hub out of reach": (
        ["model.name=roberta-base"],
        "and the local cache does not hold this model",
    ),
    "role this model lacks": (["lora.targets=[ffn_gate]"], "roberta has no role 'ffn_gate'"),
    "rank above the layer": (["lora.r=100000"], "expected a rank of at most"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(mistake: str, tmp_path: Path) -> None:
    words, message = MISTAKES[mistake]
    done = ask("train", "--config", "rule_sentiment.yaml", f"output.dir={tmp_path}", *words, code=2)
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.lr=-1", "--config", "rule_sentiment.yaml", "lora.r=0", "--json", "task.max_length=1"]
    assert cli.main(words, verb="train") == 2
    said = capsys.readouterr().err
    assert "3 problems" in said
    for key in ("train.lr", "lora.r", "task.max_length"):
        assert key in said
    for strange in ("--jsonn", "lora.r"):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*words, strange], verb="train")
        assert f"unrecognized arguments: {strange}" in capsys.readouterr().err


RECIPE = ["--config", "rule_sentiment.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tran", *RECIPE], "no verb 'tran' (did you mean 'train'?); expected train, sweep, "),
        (["train", "rule_sentiment.yaml"], "--config is required: did you mean --config rule_sentiment.yaml?\n"),
        (["sweep", "--trials", "1", "my.yml"], "--config is required: did you mean --config my.yml?\n"),
        (["train", "output.name=my.yaml"], "the following arguments are required: --config\n"),
        (["eval", "rule_sentiment.yaml"], "the following arguments are required: --adapter"),
        (["train", *RECIPE, "--lr", "1e-3"], "unrecognized arguments: --lr; did you mean train.lr=1e-3?\n"),
        (["train", *RECIPE, "--learning-rate=1e-3"], "arguments: --learning-rate=1e-3; did you mean train.lr=1e-3?\n"),
        (["train", *RECIPE, "--lora.r", "4"], "unrecognized arguments: --lora.r; did you mean lora.r=4?\n"),
        (["train", "--lr", "1e-3", *RECIPE], "did you mean train.lr=1e-3?\n"),
        (["train", *RECIPE, "--train.num_train_epochs", "2"], "did you mean train.epochs=2?\n"),
        (["train", *RECIPE, "--jsonn"], "unrecognized arguments: --jsonn\n"),
        (["train", *RECIPE, "other.yaml", "--jsonn"], "unrecognized arguments: --jsonn\n"),
        (["train", *RECIPE, "--epochs"], "did you mean train.epochs=VALUE?\n"),
    ],
)
def test_a_command_line_that_is_nearly_right_is_told_how(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", " "], "--text: expected a text, found nothing"),
        (["--text", "a", "--text-pair", "b"], "task rule-sentiment reads sentence: expected --text alone"),
        (["--input", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_bad_input_to_predict(words: list[str], message: str, trained: dict[str, Any]) -> None:
    assert message in ask("predict", "--adapter", trained["weights"], *words, code=2).stderr


@pytest.mark.parametrize("verb", ["eval", "predict"])
def test_a_damaged_or_missing_adapter_is_told_before_torch_is_loaded(
    verb: str, trained: dict[str, Any], tmp_path: Path
) -> None:
    words = ["--text", "x"] if verb == "predict" else []
    assert "not an adapter folder" in ask(verb, "--adapter", tmp_path / "nowhere", *words, code=2).stderr
    for file in Path(trained["weights"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-7])
    code = "import sys; from lora_hf.cli.main import main; status = main(); assert 'torch' not in sys.modules; sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", code, verb, "--adapter", str(tmp_path), *words], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "damaged adapter" in done.stderr


def test_a_real_task_trains_from_the_command_line(data_dir: Path, tmp_path: Path) -> None:
    words = ["model.name=tiny-roberta", f"task.data_dir={data_dir}", f"output.dir={tmp_path}", "train.max_steps=8"]
    result = last_json(ask("train", "--config", "glue_sst2.yaml", *words, "train.batch_size=8", "--json"))
    assert RunRecord.load(Path(result["run"]) / "record.json").rows == {"train": 67349, "validation": 872}
    scored = ask("eval", "--adapter", result["weights"], "--split", "validation", "--data-dir", data_dir, "--json")
    assert last_json(scored)["metrics"] == result["metrics"]
    hidden = ask("eval", "--adapter", result["weights"], "--split", "test", "--data-dir", data_dir, code=2)
    assert "labels are hidden" in hidden.stderr


def test_a_busy_machine_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = tmp_path / "loadavg"
    monkeypatch.setattr(cli, "Path", lambda _: loads)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for text, busy in (("0.1 0.2 0.3 3/200 77\n", True), ("9.9 9.9 9.9 2/200 77\n", False), ("nonsense", False)):
        loads.write_text(text, encoding="ascii")
        assert cli.machine_is_busy() == busy
    loads.unlink()
    assert not cli.machine_is_busy()
