"""OpenMP keeps a team for every thread that runs operators; more teams than one do not fit on the cores."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_hf.core.errors import AdapterError
from lora_hf.lora.precision import flush_denormals
from lora_hf.serving import engine as engine_module
from lora_hf.serving.engine import Engine
from lora_hf.serving.limits import Limits
from lora_hf.serving.model_thread import ModelThread, run_apart
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.waiting import LIMIT, wait_until


def test_all_bases_run_on_one_thread_and_load_on_threads_that_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: set[threading.Thread] = set()
    load = engine_module.load_saved_model

    def spy(*arguments: Any, **options: Any) -> Any:
        model, tokenizer = load(*arguments, **options)
        for layer in model.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.register_forward_hook(lambda *_: running.add(threading.current_thread()))
        loading.append(threading.current_thread())
        return model, tokenizer

    loading: list[threading.Thread] = []
    monkeypatch.setattr(engine_module, "load_saved_model", spy)
    with Engine(Limits(deadline=LIMIT), precision="fp32") as engine:
        engine.load("classifier", save_random(tmp_path / "a", "rule-sentiment", 0))
        engine.load("writer", save_random(tmp_path / "b", "rule-restaurants", 1))
        engine.classify("classifier", [TEXTS[0]])
        engine.generate("writer", PROMPTS[0], num_beams=1, max_new_tokens=3)
        assert len(running) == 1, "one thread for both bases"
        (thread,) = running
        engine.generate("writer", PROMPTS[0], num_beams=2, max_new_tokens=3)
        running.discard(thread)
        assert len(running) == 1, "beam search has a thread of its own"
        assert thread.is_alive()
        ended = [*running, *loading]
        assert len(ended) == 3
        wait_until(lambda: not any(each.is_alive() for each in ended))  # the answer is there before the end


def test_calls_return_and_raise_on_both_kinds_of_thread() -> None:
    def fail() -> None:
        raise AdapterError("no such adapter")

    for run in (ModelThread().run, run_apart):
        assert run(divmod, 7, 2) == (3, 1)
        with pytest.raises(AdapterError, match="no such adapter"):
            run(fail)
        assert run(threading.current_thread) is not threading.current_thread()


def test_the_thread_ends_with_its_last_reference() -> None:
    model_thread = ModelThread()
    thread = model_thread.run(threading.current_thread)
    assert thread.is_alive()
    del model_thread
    wait_until(lambda: not thread.is_alive())


def test_subnormal_numbers_count_as_zero_there() -> None:
    def product() -> float:
        return float(torch.tensor(1e-30) * 1e-10)

    with flush_denormals():
        assert product() == 0
    assert ModelThread().run(product) == 0
    assert run_apart(product) == 0
