"""The base stays as it was loaded: in bf16, int8 or nf4, with the adapter beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.cli.main import main
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.inference.generate import Generator
from lora_hf.lora.inject import lora_layers
from lora_hf.models.load import quantised_layers
from lora_hf.serving.engine import Engine
from lora_hf.serving.limits import Limits
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.waiting import LIMIT

NEW = 10  # tokens
FORMS: tuple[dict[str, Any], ...] = (
    {"precision": "bf16"},
    {"precision": "fp32", "quantised": "int8"},
    {"precision": "fp32", "quantised": "nf4"},
)


def save(folder: Path, task: str, form: dict[str, Any]) -> Path:
    """A random adapter whose run had its base in this form."""
    if form.get("quantised") == "nf4":
        pytest.importorskip("bitsandbytes")
    adapter = save_random(folder / "adapter", task)
    base = "tiny-roberta" if task == "rule-sentiment" else "tiny-gpt2"
    config = RunConfig.from_dict({"model": {"name": base, **form}, "task": {"name": task}})
    (folder / RUN_CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return adapter


def check_form(model: Any, form: dict[str, Any]) -> None:
    packed = quantised_layers(model)
    assert {layer.scheme for layer in packed.values()} == ({form["quantised"]} if "quantised" in form else set())
    dtype = torch.bfloat16 if form["precision"] == "bf16" else torch.float32
    assert model.get_input_embeddings().weight.dtype == dtype
    assert not any(layer.merged for layer in lora_layers(model).values())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.get("quantised", form["precision"]))
def test_texts_come_from_the_base_as_it_was_loaded(form: dict[str, Any], tmp_path: Path) -> None:
    saved = find_saved_model(save(tmp_path, "rule-restaurants", form))
    generator = Generator.load(saved)
    check_form(generator.model, form)
    decoding = replace(saved.generate, max_new_tokens=NEW, batch_size=1)
    wanted = list(generator.generate([generator.task.context(prompt) for prompt in PROMPTS], decoding))
    with Engine(Limits(deadline=LIMIT)) as engine:
        engine.load("w", saved.folder)
        check_form(engine._current["w"][1].model, form)
        found = [engine.generate("w", prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    assert [each.text for each in found] == [each.text for each in wanted]
    assert [each.score for each in found] == pytest.approx([each.score for each in wanted], abs=2e-2)


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.get("quantised", form["precision"]))
def test_exact_is_fp32(form: dict[str, Any], tmp_path: Path) -> None:
    saved = find_saved_model(save(tmp_path, "rule-restaurants", form))
    exact = {"precision": "fp32"}
    check_form(Generator.load(saved, exact=True).model, exact)
    with Engine(Limits(deadline=LIMIT), exact=True) as engine:
        engine.load("w", saved.folder)
        engine.load("a", save(tmp_path / "classifier", "rule-sentiment", form))
        for name in "wa":
            check_form(engine._current[name][1].model, exact)
        assert engine.classify("a", TEXTS).answers


def test_an_adapter_is_merged_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save(tmp_path, "rule-restaurants", {"precision": "fp32"})
    saved = find_saved_model(adapter)
    assert all(layer.merged for layer in lora_layers(Generator.load(saved, merge=True).model).values())
    texts = []
    for option in ([], ["--merge"], ["--exact"]):
        words = ["--adapter", str(adapter), "--prompt", PROMPTS[0], "--max-new-tokens", str(NEW), *option]
        assert main(words, verb="generate") == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


def test_exact_excludes_another_precision(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--adapter", "x", "--prompt", "x", "--exact", "--precision", "bf16"]
    assert main(words, verb="generate") == 2
    assert "--precision bf16" in capsys.readouterr().err
