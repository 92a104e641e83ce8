"""`generate`, and `eval` of a generator, on the bundled base and data."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from lora_hf.core.records import RunRecord, ScoreRecord
from tests.support.command_lines import ask, last_json

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    words = ["train.max_steps=25", "train.warmup_steps=5", "generate.num_beams=2", "generate.max_new_tokens=24"]
    done = ask(
        "train", "--config", "rule_restaurants.yaml", *words, f"output.dir={folder}", "output.plots=false", "--json"
    )
    record = RunRecord.load(Path(last_json(done)["run"]) / "record.json")
    perplexity = record.metrics["validation"]["perplexity"]
    assert perplexity == pytest.approx(record.best["value"])
    assert 1 < perplexity < math.exp(record.history[0]["loss"]), "the loss must have fallen since the first steps"
    return Path(last_json(done)["weights"])


def test_generate_writes_texts_and_scores(writer: Path, tmp_path: Path) -> None:
    prompts = ["name[The Vaults], eatType[pub], priceRange[more than £30]", "name[Aromi], food[Italian]"]
    one = last_json(ask("generate", "--adapter", writer, "--prompt", prompts[0], "--num-beams", "3", "--json"))
    assert [text["prompt"] for text in one["texts"]] == prompts[:1]
    assert one["texts"][0]["score"] < 0
    (tmp_path / "in.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    words = ["--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt", "--num-beams", "3"]
    ask("generate", "--adapter", writer, *words)
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == one["texts"][0]["text"], "a text must not depend on its batch"
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == list(zip(prompts, lines, strict=True))
    sampled = ["--prompt", prompts[1], "--temperature", "1.2", "--top-p", "0.9", "--seed", "4"]
    assert (
        ask("generate", "--adapter", writer, *sampled).stdout == ask("generate", "--adapter", writer, *sampled).stdout
    )


@pytest.mark.parametrize("adapted", [True, False])
def test_eval_scores_texts_and_writes_a_record(writer: Path, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [] if adapted else ["--without-adapter"]
    if not adapted:
        monkeypatch.setenv("PATH", "")
    java = shutil.which("java")
    scores = last_json(ask("eval", "--adapter", writer, "--split", "test", *words, "--json"))["metrics"]
    name = f"test{'' if adapted else '-without-adapter'}"
    record = ScoreRecord.load(writer.parent / f"scores-{name}.json")
    assert scores == {"test": record.metrics["all"]}
    assert record.adapted == adapted
    assert 0 <= record.metrics["all"]["BLEU"] < 1  # type: ignore[operator]
    assert (record.metrics["all"]["METEOR"] is None) == (java is None)
    lines = (writer.parent / f"predictions-{name}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == record.inputs
    content = (writer.parent / f"outputs-{name}.jsonl").read_text(encoding="utf-8")
    outputs = [json.loads(line) for line in content.splitlines()]
    assert [row["output"] for row in outputs] == lines
    assert outputs[0].keys() == {"task", "input", "references", "output"}
    assert all(row["references"] and "name : " in row["input"] for row in outputs)
    assert record.timings["generate"] > 0


def test_an_error_is_one_message_and_nothing_is_written(writer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    for words, message in (
        (["--prompt", "name[The Vaults], eatTipe[pub]"], "did you mean 'eatType'?"),
        (["--prompt", "name[" + "The Vaults " * 300 + "]"], "at most"),
        (["--input", tmp_path / "nowhere.txt"], "nowhere.txt: "),
    ):
        done = ask("generate", "--adapter", writer, *words, "--output", out, code=2)
        assert message in done.stderr
    assert not list(tmp_path.iterdir())
    for path, message in ((tmp_path / "new" / "out.txt", "create it first"), (tmp_path, "is a folder")):
        # Before the adapter, which is not there either.
        assert message in ask("generate", "--adapter", out, "--prompt", "x", "--output", path, code=2).stderr
    assert "use generate instead" in ask("predict", "--adapter", writer, "--text", "x", code=2).stderr
