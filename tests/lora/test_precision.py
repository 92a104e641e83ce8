"""What counts as zero while a model runs on the CPU."""

import threading

import pytest
import torch
from transformers import TrainerCallback

from lora_hf.core.config.loader import load_config
from lora_hf.lora.precision import flush_denormals
from lora_hf.training.run import train


def flushed() -> bool:
    return (torch.tensor(1e-30) * 1e-10).item() == 0


def test_denormals_count_as_zero_until_the_end() -> None:
    assert not flushed()
    with flush_denormals():
        assert flushed()
        assert (torch.tensor(1e-30) * 1e-7).item() > 0, "a normal number stays"
        with flush_denormals():
            pass
        assert flushed(), "the inner end leaves the outer setting"
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(flushed()))
        thread.start()
        thread.join()
        assert seen == [True]
    assert not flushed()


@pytest.mark.full
def test_a_run_flushes_and_leaves_the_caller_as_it_was(tmp_path) -> None:
    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            seen.append(flushed())

    words = ["train.max_steps=2", f"output.dir={tmp_path}", "output.plots=false"]
    train(load_config("rule_sentiment.yaml", words), callbacks=[Look()])
    assert seen == [True, True]
    assert not flushed()
