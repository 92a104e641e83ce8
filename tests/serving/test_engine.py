"""One base, many adapters, many threads: every answer matches its adapter alone, and none is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from lora_hf.adapters.format import WEIGHTS_FILE
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import GenerateConfig, LoraConfig, ModelConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor
from lora_hf.inference.generate import Generator
from lora_hf.lora.inject import inject, lora_layers
from lora_hf.models.load import load_base
from lora_hf.serving.engine import Engine
from lora_hf.serving.limits import (
    BadInputError,
    ClosingError,
    DeadlinePassedError,
    Limits,
    QueueFullError,
    RefusalError,
    TooLargeError,
    UnknownAdapterError,
    WrongKindError,
)
from lora_hf.serving.requests import Piece, digest_of
from tests import tolerances
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.waiting import LIMIT
from tests.support.word_tokenizer import word_tokenizer

TASKS = {"a": "rule-sentiment", "b": "rule-sentiment", "pair": "rte", "w": "rule-restaurants", "x": "rule-restaurants"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_random(root / name, task, seed) for seed, (name, task) in enumerate(TASKS.items())}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    """The logits of `Predictor` for TEXTS, by the digest of the adapter."""
    return {digest_of(folders[name]): offline(folders[name]) for name in ("a", "b")}


def offline(folder: Path) -> np.ndarray:
    return Predictor.load(find_saved_model(folder), "fp32").logits({"sentence": list(TEXTS)})


def served(folders: dict[str, Path], *names: str, merge: bool = False, **limits: Any) -> Engine:
    engine = Engine(Limits(**{"deadline": LIMIT, **limits}), precision="fp32", merge=merge)
    for name in names:
        engine.load(name, folders[name])
    return engine


@contextmanager
def paused(engine: Engine, name: str) -> Iterator[None]:
    """Blocks the worker of an adapter's base."""
    blocked, resume = threading.Event(), threading.Event()
    engine._current[name][1].call(lambda: blocked.set() or resume.wait())
    assert blocked.wait(LIMIT)
    try:
        yield
    finally:
        resume.set()


def model_of(engine: Engine, name: str) -> Any:
    return engine._current[name][1].model


def change_tensors(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    save_file({key: change(key, value) for key, value in tensors.items()}, folder / WEIGHTS_FILE, metadata=metadata)


def close_to(logits: Any, expected: np.ndarray) -> bool:
    return bool(np.abs(np.asarray(logits) - expected).max() < tolerances.MIXED_FP32)


def test_each_row_of_a_mixed_batch_gets_its_own_adapter(
    folders: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    digests = {name: digest_of(folders[name]) for name in ("a", "b")}
    assert np.abs(expected[digests["a"]] - expected[digests["b"]]).max() > 100 * tolerances.MIXED_FP32
    with served(folders, "a", "b", "pair", max_batch=5) as engine, ThreadPoolExecutor(8) as threads:

        def ask(number: int) -> None:
            name, rows = "ab"[number % 2], [(number + i) % len(TEXTS) for i in range(1 + number % 3)]
            answer = engine.classify(name, [TEXTS[row] for row in rows])
            assert (answer.adapter, answer.version) == (name, digests[name])
            assert close_to(answer.logits, expected[digests[name]][rows])

        list(threads.map(ask, range(60)))
        pair = engine.classify("pair", [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])])
        columns = {"sentence1": [TEXTS[0], TEXTS[2]], "sentence2": [TEXTS[1], TEXTS[3]]}
        predictor = Predictor.load(find_saved_model(folders["pair"]), "fp32")
        assert close_to(pair.logits, predictor.logits(columns))
        for answer, wanted in zip(pair.answers, predictor.predict(columns), strict=True):
            assert answer["label"] == wanted["label"]
            assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=tolerances.SERVED_PROBABILITY)


def test_waiting_requests_share_batches(folders: dict[str, Path]) -> None:
    batches: list[list[str]] = []
    with served(folders, "a", "b", max_batch=4) as engine:
        engine._current["a"][1].observer.on_batch = lambda base, rows, *_: batches.append(rows)
        with paused(engine, "a"):
            requests = [engine.submit_classify(name, TEXTS[:rows]) for name, rows in (("a", 3), ("b", 2), ("a", 1))]
            assert engine.waiting() == {"tiny-roberta": 6}
        for request in requests:
            request.future.result(LIMIT)
    assert batches == [["a", "a", "a", "b"], ["b", "a"]]


@pytest.mark.parametrize(
    "decoding",
    [
        {},
        pytest.param({"num_beams": 3, "length_penalty": 0.8}, marks=pytest.mark.full),
        {"temperature": 1.3, "top_k": 40, "seed": 5},
    ],
)
def test_texts_match_generate(decoding: dict[str, Any], folders: dict[str, Path]) -> None:
    with served(folders, "w", "x") as engine:
        with paused(engine, "w"):
            asked = [(name, prompt) for name in ("w", "x") for prompt in PROMPTS]
            requests = [
                engine.submit_generate(name, prompt, {"max_new_tokens": 20, **decoding}) for name, prompt in asked
            ]
        results = [request.future.result(60) for request in requests]
    settings = replace(GenerateConfig(max_new_tokens=20, batch_size=1, do_sample="seed" in decoding), **decoding)
    for name in ("w", "x"):
        generator = Generator.load(find_saved_model(folders[name]), "fp32")
        contexts = [generator.task.context(prompt) for prompt in PROMPTS]
        wanted = [next(generator.generate([context], settings)) for context in contexts]
        texts = [text for text, (asked_name, _) in zip(results, asked, strict=True) if asked_name == name]
        assert [text.text for text in texts] == [text.text for text in wanted]
        assert [text.score for text in texts] == pytest.approx([text.score for text in wanted], abs=2e-3)
    assert len({text.text for text in results}) > 2, "identical texts would prove nothing"


def test_beam_searches_of_one_task_share_a_batch(folders: dict[str, Path], tmp_path: Path) -> None:
    """The task decides how a text begins and ends, and what is made of it."""
    batches: list[list[str]] = []
    with served(folders, "w", "x") as engine:
        engine.load("other", save_random(tmp_path / "other", "e2e_nlg"))
        engine._current["w"][1].observer.on_batch = lambda base, rows, *_: batches.append(rows)
        decoding = {"num_beams": 2, "max_new_tokens": 4}
        with paused(engine, "w"):
            requests = [engine.submit_generate(name, PROMPTS[0], decoding) for name in ("w", "other", "x", "other")]
        for request in requests:
            request.future.result(LIMIT)
    assert batches == [["w", "x"], ["other", "other"]]


def test_streamed_pieces_join_to_the_text(folders: dict[str, Path]) -> None:
    with served(folders, "w", "x") as engine:
        pieces: dict[str, list[Piece]] = {"w": [], "x": []}
        with paused(engine, "w"):
            requests = {
                name: engine.submit_generate(name, PROMPTS[1], {"max_new_tokens": 24}, on_text=pieces[name].append)
                for name in pieces
            }
        for name, request in requests.items():
            text = request.future.result(LIMIT).text
            assert "".join(piece.text for piece in pieces[name]) == text
        assert len(pieces["w"]) > 1


def test_bare_requests_match_the_base_without_adapter(folders: dict[str, Path]) -> None:
    generator = Generator.load(find_saved_model(folders["w"]), adapted=False, precision="fp32")
    (wanted,) = generator.generate([generator.task.context(PROMPTS[0])], GenerateConfig(max_new_tokens=12))
    with served(folders, "w") as engine:
        adapted = engine.generate("w", PROMPTS[0], max_new_tokens=12)
        bare = engine.submit_generate("w", PROMPTS[0], {"max_new_tokens": 12}, bare=True).future.result(LIMIT)
        assert (bare.text, bare.version) == (wanted.text, None)
        assert engine.generate("w", PROMPTS[0], max_new_tokens=12) == adapted != bare


def test_embeddings_of_an_encoder_without_a_mask(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": 1}
    AutoModel.from_config(AutoConfig.for_model("fnet", vocab_size=100, **shape)).save_pretrained(tmp_path / "base")
    word_tokenizer(pad_token="<pad>").save_pretrained(tmp_path / "base")
    base = load_base(ModelConfig(name=str(tmp_path / "base"), precision="fp32"), get_task("rule-sentiment")).eval()
    with torch.no_grad():
        wanted = [base.base_model(torch.tensor([ids]))[0][0].mean(0) for ids in ([4, 5], [6, 7, 8], [9, 5])]
    save_adapter(inject(base, LoraConfig(r=2, targets=("all-linear",))), tmp_path / "f", task="rule-sentiment")
    with Engine(Limits(deadline=LIMIT), precision="fp32") as engine:
        engine.load("f", tmp_path / "f")
        found = engine.wait(engine.submit_embed("f", ["w0 w1", "w2 w3 w4", "w5 w1"]))
    expected = torch.nn.functional.normalize(torch.stack(wanted))
    assert torch.allclose(torch.tensor(found.vectors), expected, atol=tolerances.MIXED_FP32)


def test_a_lone_adapter_is_merged_until_another_is_loaded(
    folders: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    with served(folders, "a") as engine:
        assert close_to(engine.classify("a", TEXTS).logits, expected[digest_of(folders["a"])])
        assert not any(layer.merged for layer in lora_layers(model_of(engine, "a")).values()), "only if asked"
    with served(folders, "a", merge=True) as engine:
        model = model_of(engine, "a")
        for merged, change in ((True, None), (False, lambda: engine.load("b", folders["b"])), (True, engine.remove)):
            if merged and change:
                engine.remove("b")
            elif change:
                change()  # type: ignore[call-arg]
            answer = engine.classify("a", TEXTS)
            assert all((layer.merged is not None) == merged for layer in lora_layers(model).values())
            assert close_to(answer.logits, expected[answer.version])


def test_an_adapter_that_cannot_be_merged_is_served_unmerged(tmp_path: Path) -> None:
    tied = save_random(tmp_path / "tied", "rule-restaurants", targets=("embeddings",))
    change_tensors(tied, lambda key, value: torch.full_like(value, 0.3) if "embedding_A" in key else value)
    saved = find_saved_model(tied)
    decoding = replace(saved.generate, max_new_tokens=12)
    (expected,) = Generator.load(saved, "fp32").generate([saved.task.context(PROMPTS[0])], decoding)  # type: ignore[attr-defined]
    with Engine(precision="fp32", merge=True) as engine:
        engine.load("tied", tied)
        alone = engine.generate("tied", PROMPTS[0], max_new_tokens=12)
        bare = engine.submit_generate("tied", PROMPTS[0], {"max_new_tokens": 12}, bare=True).future.result(LIMIT)
        assert alone.text == expected.text
        assert alone.score != bare.score
        assert engine.generate("tied", PROMPTS[0], max_new_tokens=12) == alone


def test_each_answer_comes_from_the_version_it_names_during_replacement(
    folders: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    stop, seen, wrong = threading.Event(), set(), []

    def ask(engine: Engine, first: int) -> None:
        number = first
        while not stop.is_set():
            row = number % len(TEXTS)
            answer = engine.classify("changing", [TEXTS[row]])
            seen.add(answer.version)
            if not close_to(answer.logits[0], expected[answer.version][row]):
                wrong.append(answer)
            number += 1

    with served(folders, "a") as engine, ThreadPoolExecutor(5) as threads:
        engine.load("changing", folders["a"])
        asking = [threads.submit(ask, engine, first) for first in range(4)]
        try:
            versions = [engine.load("changing", folders["ba"[turn % 2]]) for turn in range(12)]
            with paused(engine, "changing"):
                old = engine.submit_classify("changing", TEXTS[:1])
                replacing = threads.submit(engine.load, "changing", folders["b"])
            assert old.future.result(LIMIT).version == versions[-1].digest == digest_of(folders["a"])
            assert replacing.result(LIMIT).digest == engine.classify("changing", TEXTS[:1]).version
        finally:
            stop.set()
        for each in asking:
            each.result(LIMIT)
        worker = engine._current["changing"][1]
        assert worker.call(lambda: None).result(LIMIT) is None
        assert worker.call(lambda: len(worker.versions)).result(LIMIT) == 2, "replaced versions are unloaded"
    assert not wrong
    assert seen == set(expected)


def test_a_damaged_replacement_keeps_the_old_version(
    folders: dict[str, Path], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with served(folders, "a", "b") as engine:
        broken = save_random(tmp_path / "broken", seed=3)
        tensors = load_file(broken / WEIGHTS_FILE)
        tensors.popitem()
        save_file(tensors, broken / WEIGHTS_FILE, metadata={"format": "pt"})
        for folder in (broken, tmp_path / "nowhere"):
            with pytest.raises(AdapterError):
                engine.load("a", folder)
        (broken / WEIGHTS_FILE).write_bytes((folders["b"] / WEIGHTS_FILE).read_bytes()[:-40])
        with pytest.raises(AdapterError, match="damaged"):
            engine.load("a", broken)
        assert close_to(engine.classify("a", TEXTS).logits, expected[digest_of(folders["a"])])
        assert len(engine.adapters()) == 2


def test_accepted_requests_are_answered_after_removal(
    folders: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    with served(folders, "a", "w") as engine:
        worker = engine._current["a"][1]
        with paused(engine, "a"):
            request = engine.submit_classify("a", TEXTS)
            engine.remove("a")
            with pytest.raises(UnknownAdapterError, match=r"'a'.*: w"):
                engine.classify("a", TEXTS)
        assert close_to(request.future.result(LIMIT).logits, expected[digest_of(folders["a"])])
        worker.thread.join()
        assert not worker.thread.is_alive(), "a base without adapters is freed"
        assert [version.name for version in engine.adapters()] == ["w"]
        engine.load("a", folders["a"])
        assert close_to(engine.classify("a", TEXTS).logits, expected[digest_of(folders["a"])])


def test_a_full_queue_refuses_with_retry_after(folders: dict[str, Path]) -> None:
    with served(folders, "a", max_queue=4, max_inputs=4) as engine:
        engine.classify("a", TEXTS)
        with paused(engine, "a"):
            waiting = [engine.submit_classify("a", TEXTS[:3])]
            with pytest.raises(QueueFullError, match="3 of 4 rows") as refused:
                engine.submit_classify("a", TEXTS[:2])
            assert refused.value.retry_after >= 1
            waiting[0].future.cancel()
            waiting = [engine.submit_classify("a", TEXTS[:2])]  # the cancelled one freed its slots
        assert len(waiting[0].future.result(LIMIT).answers) == 2


def test_late_and_cancelled_requests_never_reach_a_batch(folders: dict[str, Path]) -> None:
    with served(folders, "a") as engine:
        batches: list[int] = []
        engine._current["a"][1].observer.on_batch = lambda base, rows, *_: batches.append(len(rows))
        with paused(engine, "a"):
            late, cancelled = (engine.submit_classify("a", TEXTS[:1], seconds) for seconds in (0.01, LIMIT))
            cancelled.future.cancel()
            with pytest.raises(DeadlinePassedError, match="deadline"):
                engine.classify("a", TEXTS[:1], deadline=0.05)
            good = engine.submit_classify("a", TEXTS[:2], deadline=2 * LIMIT)
            assert good.deadline <= time.monotonic() + LIMIT, "capped at the server's limit"
        assert len(good.future.result(LIMIT).answers) == 2
        with pytest.raises(DeadlinePassedError):
            late.future.result(LIMIT)
    assert batches == [2]


def test_generation_stops_when_its_client_is_gone(folders: dict[str, Path]) -> None:
    with served(folders, "w", "x") as engine:
        steps: list[Piece] = []
        asked: Future = Future()

        def leave(piece: Piece) -> None:
            steps.append(piece)
            request.future.cancel()
            asked.set_result(None)

        with paused(engine, "w"):
            request = engine.submit_generate("w", PROMPTS[1], {"max_new_tokens": 24}, on_text=leave)
            other = engine.submit_generate("x", PROMPTS[1], {"max_new_tokens": 24})
        asked.result(LIMIT)
        assert other.future.result(LIMIT).text == engine.generate("x", PROMPTS[1], max_new_tokens=24).text
    assert len(steps) == 1


def test_nonfinite_logits_fail_only_their_own_request(
    folders: dict[str, Path], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    huge = save_random(tmp_path / "huge", seed=9)
    change_tensors(huge, lambda key, value: value.sign() * 3e38 if "classifier" in key else value)
    with served(folders, "a") as engine:
        engine.load("huge", huge)
        with paused(engine, "a"):
            requests = [engine.submit_classify(name, TEXTS) for name in ("a", "huge", "a")]
        for request in requests[::2]:
            assert close_to(request.future.result(LIMIT).logits, expected[digest_of(folders["a"])])
        with pytest.raises(AdapterError, match=r"huge.*not finite"):
            requests[1].future.result(LIMIT)


def test_a_failing_row_fails_only_its_own_request(
    folders: dict[str, Path], expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(folders, "a", "b") as engine:
        with paused(engine, "a"):
            requests = [engine.submit_classify(name, TEXTS[:2]) for name in ("a", "b", "a")]
            requests[1].inputs[1]["input_ids"][0] = 10**6  # type: ignore[attr-defined] - beyond the vocabulary
        for request in requests[::2]:
            assert close_to(request.future.result(LIMIT).logits, expected[digest_of(folders["a"])][:2])
        with pytest.raises(IndexError):
            requests[1].future.result(LIMIT)
        assert close_to(engine.classify("b", TEXTS).logits, expected[digest_of(folders["b"])])


def test_a_text_that_cannot_start_fails_only_its_own_request(folders: dict[str, Path]) -> None:
    with served(folders, "w", "x") as engine:
        wanted = engine.generate("x", PROMPTS[1], max_new_tokens=12)
        with paused(engine, "w"):
            requests = [
                engine.submit_generate(name, PROMPTS[1], {"max_new_tokens": 12}, top_logprobs=count)
                for name, count in (("x", None), ("w", 10**6), ("x", None))  # more than there are tokens
            ]
        assert [request.future.result(LIMIT) for request in requests[::2]] == [wanted, wanted]
        with pytest.raises(RuntimeError):
            requests[1].future.result(LIMIT)
        assert engine.generate("x", PROMPTS[1], max_new_tokens=12) == wanted


def test_a_text_that_cannot_be_passed_on_fails_only_its_own_request(folders: dict[str, Path]) -> None:
    def refuse(piece: Piece) -> None:
        raise OSError("nobody takes it")

    with served(folders, "w", "x") as engine:
        wanted = engine.generate("x", PROMPTS[1], max_new_tokens=12)
        with paused(engine, "w"):
            requests = [
                engine.submit_generate(name, PROMPTS[1], {"max_new_tokens": 12}, on_text=on_text)
                for name, on_text in (("x", None), ("w", refuse), ("x", None))
            ]
        assert [request.future.result(LIMIT) for request in requests[::2]] == [wanted, wanted]
        with pytest.raises(OSError, match="nobody takes it"):
            requests[1].future.result(LIMIT)


def test_a_temperature_next_to_zero_is_greedy(folders: dict[str, Path]) -> None:
    with served(folders, "w") as engine:
        greedy = engine.generate("w", PROMPTS[0], max_new_tokens=12, temperature=0)
        for temperature in (1e-40, 1e-8, 0.0099):
            assert engine.generate("w", PROMPTS[0], max_new_tokens=12, temperature=temperature) == greedy
        assert engine.generate("w", PROMPTS[0], max_new_tokens=12, temperature=2.0) != greedy


def test_close_answers_accepted_requests(folders: dict[str, Path], expected: dict[str, np.ndarray]) -> None:
    engine = served(folders, "a", "b", max_batch=1)
    with paused(engine, "a"):
        requests = [engine.submit_classify("a", TEXTS) for _ in range(3)]
    engine.close()
    for request in requests:
        assert close_to(request.future.result(0).logits, expected[digest_of(folders["a"])])
    for refused in (lambda: engine.classify("a", TEXTS), lambda: engine.load("c", folders["a"])):
        with pytest.raises(ClosingError):
            refused()


def test_close_without_grace_fails_waiting_requests(folders: dict[str, Path]) -> None:
    engine = served(folders, "a")
    with paused(engine, "a"):
        request = engine.submit_classify("a", TEXTS)
        engine.close(grace=0)
    with pytest.raises(ClosingError, match="shut down"):
        request.future.result(LIMIT)


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (lambda e: e.classify("aa", TEXTS), UnknownAdapterError, "did you mean 'a'"),
        (lambda e: e.classify("w", TEXTS), WrongKindError, "use generate instead"),
        (lambda e: e.generate("a", "x"), WrongKindError, "use classify instead"),
        (lambda e: e.classify("a", []), BadInputError, "list with at least one"),
        (lambda e: e.classify("a", "a text"), BadInputError, "expected a list"),
        (lambda e: e.classify("a", ["fine", "  "]), BadInputError, r"inputs\[1\]: expected a text"),
        (lambda e: e.classify("a", [("one", "two")]), BadInputError, r"reads one text \(sentence\), found 2"),
        (lambda e: e.classify("pair", ["one"]), BadInputError, r"reads 2 texts \(sentence1, sentence2\), found 1"),
        (lambda e: e.classify("a", ["x"] * 65), TooLargeError, "at most 64, found 65"),
        (lambda e: e.classify("a", ["x" * 10_001]), TooLargeError, "at most 10000 characters"),
        (lambda e: e.classify("a", ["\ud800"]), BadInputError, "inputs.*character 0.*surrogate"),
        (lambda e: e.generate("w", "name[The Vaults], eatTipe[pub]"), BadInputError, "did you mean 'eatType'"),
        (lambda e: e.generate("w", f"name[{'The Vaults ' * 300}]"), BadInputError, "at most"),
        (lambda e: e.generate("w", PROMPTS[0], num_beams=17), TooLargeError, "num_beams: expected at most 16"),
        (lambda e: e.generate("w", PROMPTS[0], max_new_tokens=1000), TooLargeError, "max_new_tokens"),
        (lambda e: e.generate("w", PROMPTS[0], temperature=-1.0), BadInputError, "temperature"),
        (lambda e: e.generate("w", PROMPTS[0], top_p=0.9, num_beams=2), BadInputError, "num_beams: .*found 2"),
        (lambda e: e.generate("w", PROMPTS[0], nun_beams=2), BadInputError, "did you mean 'num_beams'"),
        (lambda e: e.load("a/b", "x"), AdapterError, "adapter name 'a/b': expected"),
        (lambda e: e.remove("aa"), UnknownAdapterError, "did you mean"),
    ],
)  # fmt: skip
def test_refusals_name_what_was_expected(ask: Any, kind: type[RefusalError], message: str, refusing: Engine) -> None:
    with pytest.raises(kind, match=message):
        ask(refusing)
    assert all(version.pending == 0 for version in refusing.adapters())


@pytest.fixture(scope="module")
def refusing(folders: dict[str, Path]) -> Iterator[Engine]:
    with served(folders, "a", "pair", "w") as engine:
        yield engine


def test_limits_are_validated() -> None:
    with pytest.raises(ConfigError, match="max_batch: expected a number above 0, found 0"):
        Limits(max_batch=0)
    with pytest.raises(ConfigError, match="max_inputs, 64, found 10"):
        Limits(max_queue=10)
