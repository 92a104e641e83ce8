"""An answer does not depend on its batch, whatever the model type, the padding token and the side of the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lora_hf.adapters.resolve import SavedModel
from lora_hf.core.config.schema import GenerateConfig, ModelConfig, TaskConfig
from lora_hf.core.errors import AdapterError
from lora_hf.data.tasks.custom import custom_task
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference import classify
from lora_hf.inference.classify import MultiAdapterPredictor, Predictor
from lora_hf.inference.generate import Generator, resolve_decoding
from lora_hf.lora.unpadding import enable_unpadding
from lora_hf.models.align import READS_PADDING, align_tokenizer
from lora_hf.training.batches import padding_collator
from lora_hf.training.trainer import completion_loss, enable_optimizations
from tests.support.small_models import small_config, small_model
from tests.support.word_tokenizer import word_tokenizer

SAME = 1e-5
TEXTS = ["w1", "w1 w2 w3 w4 w5 w6 w7", "", "w5 </s>", "w5 <pad> w6 </s>", "</s> w9", "w3 <pad> <pad>", "w4 " * 20]
CLASSIFIERS = ("bert", "roberta", "mpnet", "deberta-v2", "gpt2", "llama", "qwen3", "opt", "bloom", "xlnet")
WRITERS = ("gpt2", "llama", "qwen3", "opt", "bloom")
# The tokenizer's padding token (None: it has none, so its end token pads), its side, and the config's padding token.
PADDINGS = [("<pad>", "right", 1), ("<pad>", "left", 1), ("<pad>", "left", 5), (None, "left", 1), (None, "right", None)]
POSITION_COUNTERS = ("roberta", "mpnet")  # they are made for the padding token of their config


def tokenizer_with(pad: str | None, side: str, **values: Any) -> Any:
    tokenizer = word_tokenizer(padding_side=side, pad_token=pad, **values)
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token  # as `load_tokenizer` does
    return tokenizer


def far_apart(values: np.ndarray) -> bool:
    return float(np.ptp(values, axis=0).max()) > 100 * SAME


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize(("pad", "side", "config_pad"), PADDINGS)
def test_logits(kind: str, pad: str | None, side: str, config_pad: int | None) -> None:
    if kind in POSITION_COUNTERS and config_pad != 1:
        pytest.skip(f"{kind} cannot have this padding token")
    task = get_task("sst2")
    model = small_model(kind, 3, pad_token_id=config_pad)
    predictor = Predictor(model, tokenizer_with(pad, side), task, 60)  # type: ignore[arg-type]
    rows = {"sentence": TEXTS}
    alone = predictor.logits(rows, batch_size=1)
    assert far_apart(alone)
    np.testing.assert_allclose(predictor.logits(rows, batch_size=len(TEXTS)), alone, atol=SAME, rtol=0)
    if enable_unpadding(model) is None:
        for size in (1, len(TEXTS)):
            np.testing.assert_allclose(predictor.logits(rows, batch_size=size), alone, atol=SAME, rtol=0)


@pytest.mark.parametrize("kind", READS_PADDING)
def test_models_that_compute_on_padding(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    more = {"embedding_size": 32, "num_landmarks": 64, "use_expectation": True}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=100, pad_token_id=1, initializer_range=0.2, **shape, **more)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_([*model.parameters()][-2], std=0.5)  # the output layer
    predictor = Predictor(model, tokenizer_with("<pad>", "right"), get_task("sst2"), 60)  # type: ignore[arg-type]
    assert f"{kind} computes on padding too" in caplog.text
    rows = {"sentence": ["w1", "w1 w2 w3 w4 w5 w6 w7", "w5 w7", "w9 w8", "w4 " * 20, "w3 " * 40]}
    alone = predictor.logits(rows, batch_size=1)
    assert far_apart(alone)
    np.testing.assert_allclose(predictor.logits(rows, batch_size=64), alone, atol=SAME, rtol=SAME)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_tokenizer_that_returns_no_mask(kind: str) -> None:
    """Its model_input_names lack the mask, without which an encoder reads the padding."""
    tokenizer = tokenizer_with("<pad>", "right", model_input_names=["input_ids"])
    predictor = Predictor(small_model(kind, 3), tokenizer, get_task("sst2"), 60)  # type: ignore[arg-type]
    alone = predictor.logits({"sentence": TEXTS}, batch_size=1)
    together = predictor.logits({"sentence": TEXTS}, batch_size=len(TEXTS))
    np.testing.assert_allclose(together, alone, atol=SAME, rtol=0)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_an_encoder_and_decoder(kind: str, side: str) -> None:
    tokenizer = tokenizer_with("<pad>", side, ends=True)
    predictor = Predictor(small_model(kind, 3), tokenizer, get_task("sst2"), 60)  # type: ignore[arg-type]
    rows = {"sentence": [text for text in TEXTS if "</s>" not in text]}
    alone = predictor.logits(rows, batch_size=1)
    assert far_apart(alone)
    np.testing.assert_allclose(predictor.logits(rows, batch_size=8), alone, atol=SAME, rtol=0)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_does_not_generate_beyond_its_positions(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForSeq2SeqLM.from_config(small_config(kind)).eval()
    model.generation_config.min_new_tokens = longest = 64 if kind == "bart" else 80
    task: Any = custom_task(TaskConfig(name="mine", kind="seq2seq"))
    generator = Generator(model, tokenizer_with("<pad>", "right", ends=True), task, 60)
    decoding = GenerateConfig(max_new_tokens=80, num_beams=1, from_base=())
    ((tokens, _),) = generator.generate_tokens([[5, 6, 2]], resolve_decoding(decoding, model), [], None)
    assert len(tokens) == longest
    assert ("has 64 positions, fewer than generate.max_new_tokens=80" in caplog.text) == (kind == "bart")


@pytest.mark.parametrize("beams", [1, 2])
def test_a_prompt_has_one_text_however_many_the_base_returns(beams: int) -> None:
    model = AutoModelForSeq2SeqLM.from_config(small_config("bart")).eval()
    model.generation_config.num_return_sequences = 2
    task: Any = custom_task(TaskConfig(name="mine", kind="seq2seq"))
    generator = Generator(model, tokenizer_with("<pad>", "right", ends=True), task, 60)
    prompts = [text for text in TEXTS if text]
    decoding = GenerateConfig(max_new_tokens=4, num_beams=beams, from_base=())
    assert len(list(generator.generate(prompts, decoding))) == len(prompts)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("pad", "side", "config_pad"), [("<pad>", "right", 5), (None, "left", None)])
def test_texts_and_their_scores(kind: str, pad: str | None, side: str, config_pad: int | None) -> None:
    model = small_model(kind, pad_token_id=config_pad, bos_token_id=0, eos_token_id=2, initializer_range=0.3)
    task: Any = custom_task(TaskConfig(name="mine", kind="generation"))
    generator = Generator(model, tokenizer_with(pad, side), task, 60)
    prompts = [text for text in TEXTS if text]
    for beams in (1, 2):
        at_once, alone = (
            list(generator.generate(prompts, GenerateConfig(max_new_tokens=4, num_beams=beams, batch_size=size)))
            for size in (len(prompts), 1)
        )
        assert [each.text for each in at_once] == [each.text for each in alone]
        # A score is rounded to four digits.
        assert [each.score for each in at_once] == pytest.approx([each.score for each in alone], abs=1.1e-4)
        assert len({each.text for each in alone}) > 1


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("pad", "side", "config_pad"), PADDINGS)
@pytest.mark.parametrize("optimized", [False, True])
def test_the_likelihoods_of_a_perplexity(
    kind: str, pad: str | None, side: str, config_pad: int | None, optimized: bool
) -> None:
    model, tokenizer = small_model(kind, pad_token_id=config_pad), tokenizer_with(pad, side)
    align_tokenizer(tokenizer, model)
    if optimized:
        enable_optimizations(model.requires_grad_(False))
    task = custom_task(TaskConfig(name="mine", kind="generation"))
    rows = {"prompt": ["w1", "w2 " * 15, "w3 <pad> w4 </s>"], "completion": ["w5", "w6 w7 </s> w8", "w9 " * 12]}
    encoded = task.encode(rows, tokenizer, 60)
    del encoded["truncated"]
    rows_encoded = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    collate = padding_collator(model, tokenizer, "causal-lm")

    def likelihoods(batch: list[Any]) -> torch.Tensor:
        inputs = collate([dict(row) for row in batch])
        with torch.no_grad():
            output = model(**inputs)
        return completion_loss(output.rows if "rows" in output else output.logits, inputs["labels"])

    alone = torch.cat([likelihoods([row]) for row in rows_encoded])
    torch.testing.assert_close(likelihoods(rows_encoded), alone, atol=SAME, rtol=1e-6)
    assert tokenizer.padding_side == side, "a saved tokenizer keeps its side"


def test_the_dropout_of_a_run_makes_no_other_base(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(Exception):  # noqa: N818
        pass

    def load(*_: Any, **__: Any) -> Any:
        raise Loaded

    monkeypatch.setattr(classify, "load_saved_model", load)
    task = get_task("sst2")
    models = [ModelConfig(name="tiny-roberta", dropout=dropout) for dropout in (None, 0.1)]
    with pytest.raises(Loaded):
        MultiAdapterPredictor.load({str(i): SavedModel(Path(), False, task, model) for i, model in enumerate(models)})
    models[1] = ModelConfig(name="tiny-roberta", init="random")
    with pytest.raises(AdapterError, match="with the same settings in model"):
        MultiAdapterPredictor.load({str(i): SavedModel(Path(), False, task, model) for i, model in enumerate(models)})
