"""Command lines on the bundled base and data, in new processes or in this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import is_peft_available

from lora_hf.cli.main import main, with_flags
from lora_hf.core.records import RunRecord
from tests.support.command_lines import REPO, ask, last_json, run

LOAD_TRANSFORMERS_AFTER_A_COMMAND = """
import contextlib, sys
from lora_hf.cli.main import main
sys.argv = ["lora-hf", "--help"]
with contextlib.suppress(SystemExit):
    main()
from transformers.utils import is_peft_available
print(is_peft_available())
"""
QUICK = ["train.max_steps=12", "train.warmup_steps=2"]


@pytest.mark.full
@pytest.mark.parametrize("script", sorted(file.stem for file in (REPO / "scripts").glob("*.py")))
def test_every_script_runs_its_verb(script: str) -> None:
    assert run(script, "--help").stdout.startswith(f"usage: python scripts/{script}.py ")


@pytest.mark.parametrize(
    ("words", "verb", "usage"),
    [
        (["--config", "rule_sentiment.yaml", "--confg"], "train", "usage: python scripts/train.py [-h] --config"),
        (["train", "--nothing"], "benchmark", "usage: python scripts/benchmark.py [-h]"),
        (["glue", "--help"], "benchmark", "usage: python scripts/benchmark.py glue [-h]"),
        (["train", "--config", "rule_sentiment.yaml", "--confg"], None, "usage: lora-hf train [-h] --config"),
        ([], None, "usage: lora-hf [-h] VERB"),
    ],
)
def test_usage_names_the_program_as_called(
    words: list[str], verb: str | None, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words, verb=verb)
    output = capsys.readouterr()
    assert (output.out + output.err).startswith(usage)
    assert ended.value.code == (0 if "--help" in words else 2)


def test_without_a_verb_help_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "  sweep " in capsys.readouterr().err


def test_a_process_that_runs_a_command_does_not_import_peft() -> None:
    """Transformers imports it if it finds it; in this process, which runs other things as well, it still does."""
    command = [sys.executable, "-c", LOAD_TRANSFORMERS_AFTER_A_COMMAND]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("\nFalse\n")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert is_peft_available()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("outputs")
    done = ask(
        "train", "--config", "rule_sentiment.yaml", *QUICK, f"output.dir={folder}", "output.plots=false", "--json"
    )
    assert len(done.stdout.splitlines()) == 1, "standard output is for the result"
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
    written = {name: lines[1][f"probability_{name}"] for name in answer["probabilities"]}
    assert written == pytest.approx(answer["probabilities"], abs=2e-4)


def test_a_copied_adapter_needs_no_run_folder(trained: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in Path(trained["weights"]).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert last_json(ask("eval", "--adapter", copy, "--json"))["metrics"] == trained["metrics"]


INVALID: dict[str, tuple[list[str], str]] = {
    "unknown key": (["lora.rank=3"], "lora.rank: unknown key"),
    "mistyped key": (["train.batchsize=3"], "train.batchsize: unknown key (did you mean 'batch_size'?)"),
    "negative rate": (["train.lr=-1"], "train.lr: expected a number > 0, found -1"),
    "wrong type": (["lora.r=many"], "lora.r: expected a whole number >= 1, found 'many'"),
    "unknown task": (["task.name=sst3"], "'sst3' (did you mean 'sst2'?)"),
    "missing data folder": (["task.name=sst2", "task.data_dir=nowhere"], "task.data_dir=nowhere"),
    "unknown model": (["model.name=tiny-robert"], "did you mean 'tiny-roberta'?"),
    "missing model folder": (["model.name=./nowhere"], "./nowhere: "),
    "hub out of reach": (
        ["model.name=roberta-base"],
        "local cache",
    ),
    "role this model lacks": (["lora.targets=[ffn_gate]"], "'ffn_gate'"),
    "rank above the layer": (["lora.r=100000"], "at most"),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_config_is_one_message_and_exit_code_2(case: str, tmp_path: Path) -> None:
    words, message = INVALID[case]
    done = ask(
        "train", "--config", "rule_sentiment.yaml", f"output.dir={tmp_path}", "output.plots=false", *words, code=2
    )
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir()), "no folder may remain"


def test_overrides_may_come_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.lr=-1", "--config", "rule_sentiment.yaml", "lora.r=0", "--json", "task.max_length=1"]
    assert main(words, verb="train") == 2
    message = capsys.readouterr().err
    assert "3 problems" in message
    for key in ("train.lr", "lora.r", "task.max_length"):
        assert key in message
    for unknown in ("--jsonn", "lora.r"):
        with pytest.raises(SystemExit, match="2"):
            main([*words, unknown], verb="train")
        assert f"unrecognized arguments: {unknown}" in capsys.readouterr().err


RECIPE = ["--config", "rule_sentiment.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran", *RECIPE], "unknown verb 'tran' (did you mean 'train'?); expected one of train, plan, "),
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
def test_invalid_command_lines_get_a_hint(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", " "], "--text: expected a text"),
        (["--text", "a", "--text-pair", "b"], "task rule-sentiment reads sentence: expected --text alone"),
        (["--input", "nowhere.txt"], "nowhere.txt: "),
    ],
)
def test_bad_input_to_predict(words: list[str], message: str, trained: dict[str, Any]) -> None:
    assert message in ask("predict", "--adapter", trained["weights"], *words, code=2).stderr


@pytest.mark.parametrize("verb", ["eval", "predict"])
def test_a_damaged_or_missing_adapter_is_reported_before_torch_is_imported(
    verb: str, trained: dict[str, Any], tmp_path: Path
) -> None:
    words = ["--text", "x"] if verb == "predict" else []
    assert "nowhere: " in ask(verb, "--adapter", tmp_path / "nowhere", *words, code=2).stderr
    for file in Path(trained["weights"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-7])
    code = "import sys; from lora_hf.cli.main import main; status = main(); "
    code += "assert 'torch' not in sys.modules; sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", code, verb, "--adapter", str(tmp_path), *words], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "damaged" in done.stderr


@pytest.mark.full
def test_a_real_task_trains_from_the_command_line(data_dir: Path, tmp_path: Path) -> None:
    words = [
        "model.name=tiny-roberta",
        f"task.data_dir={data_dir}",
        f"output.dir={tmp_path}",
        "output.plots=false",
        "task.train_rows=2000",
        "train.max_steps=8",
    ]
    result = last_json(ask("train", "--config", "glue_sst2.yaml", *words, "train.batch_size=8", "--json"))
    assert RunRecord.load(Path(result["run"]) / "record.json").rows == {"train": 2000, "validation": 872}
    scored = ask("eval", "--adapter", result["weights"], "--split", "validation", "--data-dir", data_dir, "--json")
    assert last_json(scored)["metrics"] == result["metrics"]
    hidden = ask("eval", "--adapter", result["weights"], "--split", "test", "--data-dir", data_dir, code=2)
    assert "hidden" in hidden.stderr


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("output runs/a: exists; pass overwrite=True", "--output runs/a: exists; pass --overwrite"),
        ("max_batch: expected a number", "--max-batch: expected a number"),
        ("host=::1 port=80: cannot listen; port=0 is free", "--host ::1 --port 80: cannot listen; --port 0 is free"),
        ("continue with resume='auto'", "continue with --resume 'auto'"),
        ("output of the model: too long", "output of the model: too long"),
        ("model.output=x, num_port=3, rte:port=1", "model.output=x, num_port=3, rte:port=1"),
        ("rank: not an option here, rank=2", "rank: not an option here, rank=2"),
    ],
)
def test_library_errors_name_the_flags_of_the_command(message: str, expected: str) -> None:
    assert with_flags(message, ["output", "overwrite", "max_batch", "host", "port", "resume"]) == expected
    assert with_flags(message, []) == message
