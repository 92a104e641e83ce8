"""`merge` and `combine` on the bundled bases and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_hf.cli.main import main
from lora_hf.core.records import CombineRecord, MergeRecord
from tests.support.command_lines import ask, last_json

pytestmark = pytest.mark.full

QUICK = ["train.max_steps=6", "train.warmup_steps=2", "model.precision=fp32"]


def result_of(verb: str, *words: str | Path) -> dict[str, Any]:
    """The JSON that a command prints."""
    return last_json(ask(verb, *words, "--json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one` and `two` of tiny-roberta, and `writer` of tiny-gpt2."""
    outputs = tmp_path_factory.mktemp("outputs")
    for name, seed in (("one", 0), ("two", 1)):
        words = [
            f"output.dir={outputs}",
            "output.plots=false",
            f"output.name={name}",
            f"train.seed={seed}",
            "train.lr=3e-3",
        ]
        assert main(["train", "--config", "rule_sentiment.yaml", *QUICK, *words]) == 0
    words = [
        f"output.dir={outputs}",
        "output.plots=false",
        "output.name=writer",
        "generate.num_beams=1",
        "generate.max_new_tokens=8",
    ]
    assert main(["train", "--config", "rule_restaurants.yaml", *QUICK, *words]) == 0
    return outputs


def test_a_merged_classifier_answers_like_its_adapter(folder: Path, tmp_path: Path) -> None:
    adapter, merged = folder / "one" / "adapter", tmp_path / "merged"
    first_line = ask("merge", "--adapter", adapter, "--output", merged).stdout.splitlines()[0]
    assert "drift: " in first_line
    assert "tolerance of 1e-05" in first_line
    assert result_of("eval", "--adapter", merged)["metrics"] == result_of("eval", "--adapter", adapter)["metrics"]
    text = ["--text", "A moving, funny and wise film."]
    assert result_of("predict", "--adapter", merged, *text) == result_of("predict", "--adapter", adapter, *text)


@pytest.mark.usefixtures("without_java")
def test_a_merged_generator_answers_like_its_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, merged = folder / "writer" / "adapter", folder / "writer" / "merged"
    result = result_of("merge", "--adapter", adapter, "--output", merged)
    assert result["drift"] == MergeRecord.load(merged / "merge.json").drift
    prompt = ["--prompt", "name[The Vaults], eatType[pub]"]
    texts = [result_of("generate", "--adapter", folder, *prompt)["texts"] for folder in (adapter, merged)]
    assert [text["text"] for text in texts[0]] == [text["text"] for text in texts[1]]
    found = result_of("eval", "--adapter", merged, "--split", "test")["metrics"]
    assert not list(merged.parent.glob("scores-*")), "a run folder holds only records of its own weights"
    assert found == result_of("eval", "--adapter", adapter, "--split", "test")["metrics"]
    assert list(merged.parent.glob("scores-*"))
    assert main(["eval", "--adapter", str(merged), "--without-adapter"]) == 2
    assert "is a whole model" in capsys.readouterr().err


def test_a_combined_adapter_works_like_any_other(folder: Path, tmp_path: Path) -> None:
    one, two = folder / "one" / "adapter", folder / "two" / "adapter"
    result_of("combine", "--adapter", f"{one}=1", "--output", tmp_path / "same")
    assert (
        result_of("eval", "--adapter", tmp_path / "same")["metrics"] == result_of("eval", "--adapter", one)["metrics"]
    )
    words = ["--adapter", f"{one}=0.7", "--adapter", f"{two}=0.3"]
    assert result_of("combine", *words, "--output", tmp_path / "sum")["error"] == 0
    printed = ask("combine", *words, "--method", "svd", "--rank", "4", "--output", tmp_path / "short").stdout
    record = CombineRecord.load(tmp_path / "short" / "combine.json")
    assert f"{record.error:.2%} overall" in printed
    assert 0 < record.error < 1
    assert set(record.ranks.values()) == {4}
    assert [entry["weight"] for entry in record.adapters] == [0.7, 0.3]
    result_of("combine", *words, "--method", "ties", "--density", "0.5", "--output", tmp_path / "ties")
    result_of("merge", "--adapter", tmp_path / "ties", "--output", tmp_path / "merged")
    scores = [result_of("eval", "--adapter", tmp_path / name)["metrics"] for name in ("ties", "merged")]
    assert scores[0] == scores[1]


def test_an_error_is_one_message_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, writer, full = folder / "one" / "adapter", folder / "writer" / "adapter", tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("x")
    out = tmp_path / "out"
    for verb, words, message in (
        ("merge", ["--adapter", tmp_path / "nowhere", "--output", out], "nowhere: "),
        ("merge", ["--adapter", one, "--output", full], "not empty"),
        ("merge", ["--adapter", one, "--output", full, "--overwrite"], "merge.json"),
        ("combine", ["--adapter", one, "--output", out], "expected DIR=WEIGHT"),
        ("combine", ["--adapter", f"{one}=much", "--output", out], "expected DIR=WEIGHT"),
        ("combine", ["--adapter", f"{one}=1", "--output", full], "not empty"),
        ("combine", ["--adapter", f"{one}=1", "--adapter", f"{writer}=1", "--output", out], "different bases"),
        ("combine", ["--adapter", f"{one}=1", "--rank", "500", "--method", "svd", "--output", out], "at most"),
        ("combine", ["--adapter", f"{one}=1", "--density", "2", "--method", "ties", "--output", out], "found 2.0"),
    ):
        assert main([verb, *map(str, words)]) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert output.err.count("error:") == 1
        assert not output.out
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]
