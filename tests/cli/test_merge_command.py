"""The command lines of merging and combining on the embedded bases and data.

All of it goes through `main` in this process, which loads torch once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_hf.cli.main import main
from lora_hf.core.records import CombineRecord, MergeRecord
from tests.support.command_lines import ask, last_json

QUICK = ["train.max_steps=12", "train.warmup_steps=2", "model.precision=fp32"]


def asked(verb: str, *words: str | Path) -> dict[str, Any]:
    """The JSON that a command line ends with."""
    return last_json(ask(verb, *words, "--json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one` and `two` of tiny-roberta, and `writer` of tiny-gpt2."""
    outputs = tmp_path_factory.mktemp("outputs")
    for name, seed in (("one", 0), ("two", 1)):
        words = [f"output.dir={outputs}", f"output.name={name}", f"train.seed={seed}", "train.lr=3e-3"]
        assert main(["train", "--config", "rule_sentiment.yaml", *QUICK, *words]) == 0
    words = [f"output.dir={outputs}", "output.name=writer", "generate.num_beams=1", "generate.max_new_tokens=8"]
    assert main(["train", "--config", "rule_restaurants.yaml", *QUICK, *words]) == 0
    return outputs


def test_a_merged_classifier_scores_and_answers_as_its_adapter(folder: Path, tmp_path: Path) -> None:
    adapter, merged = folder / "one" / "adapter", tmp_path / "merged"
    said = ask("merge", "--adapter", adapter, "--output", merged).stdout
    assert said.startswith("drift: a logit moved by at most ")
    assert said.splitlines()[0].endswith(", allowed 1e-05: fine")
    assert asked("eval", "--adapter", merged)["metrics"] == asked("eval", "--adapter", adapter)["metrics"]
    text = ["--text", "A moving, funny and wise film."]
    assert asked("predict", "--adapter", merged, *text) == asked("predict", "--adapter", adapter, *text)


@pytest.mark.usefixtures("without_java")
def test_a_merged_writer_writes_and_scores_as_its_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, merged = folder / "writer" / "adapter", folder / "writer" / "merged"
    result = asked("merge", "--adapter", adapter, "--output", merged)
    assert result["drift"] == MergeRecord.load(merged / "merge.json").drift
    prompt = ["--prompt", "name[The Vaults], eatType[pub]"]
    texts = [asked("generate", "--adapter", place, *prompt)["texts"] for place in (adapter, merged)]
    assert [text["text"] for text in texts[0]] == [text["text"] for text in texts[1]]
    found = asked("eval", "--adapter", merged, "--split", "test")["metrics"]
    assert not list(merged.parent.glob("scores-*")), "the records of a run are of its own weights"
    assert found == asked("eval", "--adapter", adapter, "--split", "test")["metrics"]
    assert list(merged.parent.glob("scores-*"))
    assert main(["eval", "--adapter", str(merged), "--without-adapter"]) == 2
    assert "is a whole model, which has no base beside it" in capsys.readouterr().err


def test_a_combined_adapter_is_one_like_any_other(folder: Path, tmp_path: Path) -> None:
    one, two = folder / "one" / "adapter", folder / "two" / "adapter"
    asked("combine", "--adapter", f"{one}=1", "--output", tmp_path / "same")
    assert asked("eval", "--adapter", tmp_path / "same")["metrics"] == asked("eval", "--adapter", one)["metrics"]
    words = ["--adapter", f"{one}=0.7", "--adapter", f"{two}=0.3"]
    assert asked("combine", *words, "--output", tmp_path / "sum")["error"] == 0
    said = ask("combine", *words, "--method", "svd", "--rank", "4", "--output", tmp_path / "short").stdout
    record = CombineRecord.load(tmp_path / "short" / "combine.json")
    assert f"left out by the rank: {record.error:.2%} of all" in said
    assert 0 < record.error < 1
    assert set(record.ranks.values()) == {4}
    assert [entry["weight"] for entry in record.adapters] == [0.7, 0.3]
    asked("combine", *words, "--method", "ties", "--density", "0.5", "--output", tmp_path / "ties")
    asked("merge", "--adapter", tmp_path / "ties", "--output", tmp_path / "merged")
    scores = [asked("eval", "--adapter", tmp_path / name)["metrics"] for name in ("ties", "merged")]
    assert scores[0] == scores[1]


def test_mistakes_are_one_message_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, writer, full = folder / "one" / "adapter", folder / "writer" / "adapter", tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("x")
    out = tmp_path / "out"
    for verb, words, message in (
        ("merge", ["--adapter", tmp_path / "nowhere", "--output", out], "not an adapter folder"),
        ("merge", ["--adapter", one, "--output", full], "exists and is not empty"),
        ("merge", ["--adapter", one, "--output", full, "--overwrite"], "holds no merge.json"),
        ("combine", ["--adapter", one, "--output", out], "expected DIR=WEIGHT"),
        ("combine", ["--adapter", f"{one}=much", "--output", out], "expected DIR=WEIGHT"),
        ("combine", ["--adapter", f"{one}=1", "--output", full], "exists and is not empty"),
        ("combine", ["--adapter", f"{one}=1", "--adapter", f"{writer}=1", "--output", out], "on different bases"),
        ("combine", ["--adapter", f"{one}=1", "--rank", "500", "--method", "svd", "--output", out], "at most that"),
        ("combine", ["--adapter", f"{one}=1", "--density", "2", "--method", "ties", "--output", out], "found 2.0"),
    ):
        assert main([verb, *map(str, words)]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.count("error:") == 1
        assert not said.out
    assert [place.name for place in tmp_path.iterdir()] == ["full"]
    assert [place.name for place in full.iterdir()] == ["thesis.txt"]
