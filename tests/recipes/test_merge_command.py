"""The command lines of merging and combining, as subprocesses, on the embedded bases and data."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.records import CombineRecord, MergeRecord
from tests.recipes.test_commands import last_json, run

QUICK = ["train.max_steps=12", "train.warmup_steps=2", "model.precision=fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one` and `two` of tiny-roberta, and `writer` of tiny-gpt2."""
    outputs = tmp_path_factory.mktemp("outputs")
    for name, seed in (("one", 0), ("two", 1)):
        words = [f"output.dir={outputs}", f"output.name={name}", f"train.seed={seed}", "train.lr=3e-3"]
        run("train", "--config", "rule_sentiment.yaml", *QUICK, *words)
    words = [f"output.dir={outputs}", "output.name=writer", "generate.num_beams=2", "generate.max_new_tokens=16"]
    run("train", "--config", "rule_restaurants.yaml", *QUICK, *words)
    return outputs


def test_a_merged_classifier_scores_and_answers_as_its_adapter(folder: Path, tmp_path: Path) -> None:
    adapter, merged = folder / "one" / "adapter", tmp_path / "merged"
    said = run("merge", "--adapter", adapter, "--output", merged).stdout
    assert said.startswith("drift: a logit moved by at most ")
    scores = [last_json(run("eval", "--adapter", place, "--json"))["metrics"] for place in (adapter, merged)]
    assert scores[0] == scores[1]
    texts = ["--text", "A moving, funny and wise film."]
    answers = [run("predict", "--adapter", place, *texts).stdout for place in (adapter, merged)]
    assert answers[0] == answers[1]


def test_a_merged_writer_writes_and_scores_as_its_adapter(folder: Path, tmp_path: Path) -> None:
    adapter, merged = folder / "writer" / "adapter", tmp_path / "merged"
    result = last_json(run("merge", "--adapter", adapter, "--output", merged, "--json"))
    assert result["drift"] == MergeRecord.load(merged / "merge.json").drift
    prompt = ["--prompt", "name[The Vaults], eatType[pub]", "--json"]
    texts = [last_json(run("generate", "--adapter", place, *prompt))["texts"] for place in (adapter, merged)]
    assert [text["text"] for text in texts[0]] == [text["text"] for text in texts[1]]
    words = ["--split", "test", "--json"]
    scores = [last_json(run("eval", "--adapter", place, *words))["metrics"] for place in (adapter, merged)]
    assert scores[0] == scores[1]
    refused = run("eval", "--adapter", merged, "--without-adapter", code=2)
    assert "is a whole model, which has no base beside it" in refused.stderr


def test_a_combined_adapter_is_one_like_any_other(folder: Path, tmp_path: Path) -> None:
    one, two = folder / "one" / "adapter", folder / "two" / "adapter"
    run("combine", "--adapter", f"{one}=1", "--output", tmp_path / "same")
    scores = [last_json(run("eval", "--adapter", place, "--json"))["metrics"] for place in (one, tmp_path / "same")]
    assert scores[0] == scores[1]
    words = ["--adapter", f"{one}=0.7", "--adapter", f"{two}=0.3"]
    exact = last_json(run("combine", *words, "--output", tmp_path / "sum", "--json"))
    assert exact["error"] == 0
    short = ["--method", "svd", "--rank", "4", "--output", tmp_path / "short"]
    said = run("combine", *words, *short).stdout
    record = CombineRecord.load(tmp_path / "short" / "combine.json")
    assert f"left out by the rank: {record.error:.2%} of all" in said
    assert 0 < record.error < 1
    assert set(record.ranks.values()) == {4}
    assert [entry["weight"] for entry in record.adapters] == [0.7, 0.3]
    ties = ["--method", "ties", "--density", "0.5", "--output", tmp_path / "ties"]
    run("combine", *words, *ties)
    run("merge", "--adapter", tmp_path / "ties", "--output", tmp_path / "merged")
    scores = [last_json(run("eval", "--adapter", tmp_path / name, "--json"))["metrics"] for name in ("ties", "merged")]
    assert scores[0] == scores[1]


def test_mistakes_are_one_message_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
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
        done = run(verb, *words, code=2)
        assert message in done.stderr
        assert done.stderr.count("error:") == 1
        assert not done.stdout
    assert [place.name for place in tmp_path.iterdir()] == ["full"]
    assert [place.name for place in full.iterdir()] == ["thesis.txt"]
