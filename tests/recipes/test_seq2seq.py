"""Encoder-decoders through every verb: small random T5 and BART that learn to copy the first words of a source."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.records import RunRecord, ScoreRecord
from lora_hf.data.tasks.seq2seq import Seq2Seq
from lora_hf.inference.generate import Generator
from lora_hf.serving.engine import Engine
from lora_hf.serving.requests import Piece
from tests.support.command_lines import ask, last_json
from tests.support.span_data import save_encoder_decoder, write_copies
from tests.support.waiting import LIMIT

SOURCES = ["w1 w2 w3 w4", "w9 w8 w7", "w5 w5 w6 w70 w71"]
KINDS = [pytest.param(kind, marks=() if kind == "t5" else pytest.mark.full) for kind in ("t5", "bart", "mbart", "mt5")]


def train(folder: Path, kind: str, *more: str) -> Path:
    base = save_encoder_decoder(folder / "base", kind)
    write_copies(folder / "train.jsonl", 64, seed=0)
    write_copies(folder / "validation.jsonl", 12, seed=1)
    config = ["task.name=copies", "task.prefix=w0 ", f"task.data_dir={folder}", f"model.name={base}", "train.lr=1e-2"]
    words = ["model.precision=fp32", "train.max_steps=12", "lora.targets=all", "task.max_length=32", *more]
    done = ask(
        "train",
        "--config",
        "summarize_t5.yaml",
        *config,
        *words,
        f"output.dir={folder}",
        "output.plots=false",
        "--json",
    )
    return Path(last_json(done)["weights"])


@pytest.fixture(scope="module", params=KINDS)
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp(request.param), request.param)


def test_it_learns(writer: Path) -> None:
    record = RunRecord.load(writer.parent / "record.json")
    assert record.best["metric"] == "eval_validation_perplexity"
    assert record.best["value"] == pytest.approx(record.metrics["validation"]["perplexity"])
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_it_decodes_as_its_base_says(writer: Path) -> None:
    config = yaml.safe_load((writer / "config.yaml").read_text())
    assert config["generate"] == {"max_new_tokens": 128, "seed": 0, "batch_size": 16}, "only what was given"
    saved = find_saved_model(writer)
    generator = Generator.load(saved)
    contexts = [saved.task.context(source) for source in SOURCES]  # type: ignore[attr-defined]
    found = [text.text for text in generator.generate(contexts, saved.generate)]
    inputs = generator.tokenizer(contexts, return_tensors="pt", padding=True)
    expected = generator.model.generate(**inputs, max_new_tokens=128, max_length=None)  # type: ignore[operator]
    assert found == generator.tokenizer.batch_decode(expected, skip_special_tokens=True)
    greedy = [
        text.text for text in generator.generate(contexts, saved.generate.override(num_beams=1, max_new_tokens=4))
    ]
    expected = generator.model.generate(**inputs, num_beams=1, max_new_tokens=4, max_length=None)  # type: ignore[operator]
    assert greedy == generator.tokenizer.batch_decode(expected, skip_special_tokens=True)
    alone = [next(generator.generate([context], saved.generate)).text for context in contexts]
    assert alone == found, "a text must not depend on its batch"


def test_eval_scores_texts(writer: Path) -> None:
    scores = last_json(ask("eval", "--adapter", writer, "--json"))["metrics"]["validation"]
    assert list(scores) == ["ROUGE_1", "ROUGE_2", "ROUGE_L", "BLEU", "chrF"]
    record = ScoreRecord.load(writer.parent / "scores-validation.json")
    assert record.metrics["all"] == scores
    assert record.decoding["num_beams"] == 2, "that of the base"
    (text,) = last_json(ask("generate", "--adapter", writer, "--prompt", SOURCES[0], "--num-beams", "1", "--json"))[
        "texts"
    ]
    assert text["prompt"] == SOURCES[0]
    assert text["score"] < 0


def test_it_is_served(writer: Path) -> None:
    saved = find_saved_model(writer)
    contexts = [saved.task.context(source) for source in SOURCES]  # type: ignore[attr-defined]
    expected = [text.text for text in Generator.load(saved).generate(contexts, saved.generate)]
    streamed: list[Piece] = []
    with Engine() as engine:
        engine.load("copies", writer)
        assert [engine.generate("copies", source).text for source in SOURCES] == expected
        request = engine.submit_generate("copies", SOURCES[0], {"num_beams": 1}, on_text=streamed.append)
        greedy = engine.wait(request)
        assert greedy.text.startswith("".join(piece.text for piece in streamed))
        assert greedy.completion_tokens > 1
        # A chat request without max_tokens: the source takes no space from the new tokens.
        assert engine.wait(engine.submit_generate("copies", SOURCES[0], {"num_beams": 1}, fit=True)) == greedy


def test_a_served_prompt_for_the_bare_base_has_no_part_of_a_task(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seq2Seq, "clean", lambda self, text: f"<{text}>")
    with Engine() as engine:
        base = engine.load("copies", writer).base
        assert engine.generate("copies", SOURCES[0], max_new_tokens=6).text.startswith("<")
        assert not engine.generate(base, SOURCES[0], max_new_tokens=6).text.startswith("<")


def test_texts_that_share_a_batch_are_as_each_alone(writer: Path) -> None:
    """A stop string ends one of them early, and what might begin a stop string is streamed in the end."""

    def refuse(piece: Piece) -> None:
        raise OSError("nobody takes it")

    decoding = {"num_beams": 1, "max_new_tokens": 6}
    with Engine() as engine:
        engine.load("copies", writer)
        text = engine.generate("copies", SOURCES[0], **decoding).text
        first, *_, last = text.split()
        asked: list[tuple[list[str], list[Piece]]] = [([first], []), ([f"{last} w999"], []), ([], [])]
        alone = [engine.wait(engine.submit_generate("copies", SOURCES[0], decoding, stop=stop)) for stop, _ in asked]
        blocked, resume = threading.Event(), threading.Event()
        engine._current["copies"][1].call(lambda: blocked.set() or resume.wait())
        assert blocked.wait(LIMIT)
        requests = [
            engine.submit_generate("copies", SOURCES[0], decoding, stop=stop, on_text=pieces.append)
            for stop, pieces in asked
        ]
        failing = engine.submit_generate("copies", SOURCES[0], decoding, on_text=refuse)
        resume.set()
        assert [request.future.result(LIMIT) for request in requests] == [
            replace(each, score=pytest.approx(each.score, abs=1e-3)) for each in alone
        ]
        with pytest.raises(OSError, match="nobody takes it"):
            failing.future.result(LIMIT)
    assert (alone[0].text, alone[0].finish_reason) == ("", "stop")
    assert ["".join(piece.text for piece in pieces) for _, pieces in asked] == [each.text for each in alone]


@pytest.mark.full
def test_t5_in_bf16_has_no_nan(tmp_path: Path) -> None:
    adapter = train(tmp_path, "t5", "model.precision=bf16", "train.label_smoothing=0.1")
    record = RunRecord.load(adapter.parent / "record.json")
    values = [value for entry in record.history for key, value in entry.items() if key.endswith(("loss", "grad_norm"))]
    assert values
    assert torch.isfinite(torch.tensor(values)).all()


def test_only_settings_that_are_not_given_come_from_the_base() -> None:
    given = GenerateConfig(num_beams=4).with_base_settings()
    assert "num_beams" not in (given.from_base or ())
    assert "length_penalty" in (given.from_base or ())
    assert "length_penalty" not in (given.override(length_penalty=1.0).from_base or ())
