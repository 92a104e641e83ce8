"""The baseline that is prompted with examples: what it is asked, and that batches change no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.config.schema import GenerateConfig
from lora_hf.data.tasks.registry import get_task
from tests.support.chat_models import save_chat_model
from tools.benchmark import prompted


@pytest.mark.usefixtures("without_java")
def test_each_input_follows_the_same_training_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_chat_model(tmp_path / "tiny-chat")
    monkeypatch.setattr(prompted, "EXAMPLES", 1)  # the small model reads 256 tokens
    monkeypatch.setattr(prompted, "DECODING", GenerateConfig(max_new_tokens=8, batch_size=4))
    record, texts = prompted.score_prompted("rule-restaurants", str(model), None, limit=5)
    assert record.inputs == len(texts) == 5
    assert (record.adapted, record.model) == (False, "tiny-chat")
    assert record.metrics["all"]["BLEU"] is not None

    task = get_task("rule-restaurants")
    training, test = (task.groups(task.load(None, [split])[split]) for split in ("train", "test"))
    answers = {example.context: example.references[0] for example in training}
    turns = record.decoding["prompt"]
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * prompted.EXAMPLES]
    asked, answered = turns[1::2], turns[2::2]
    assert [answers[turn["content"]] for turn in asked] == [turn["content"] for turn in answered]
    assert len({turn["content"] for turn in asked}) == prompted.EXAMPLES

    generator, shots = prompted.load_generator(str(model)), prompted.draw_examples(task, None, prompted.EXAMPLES)
    for example, text in zip(test, texts, strict=False):
        alone = prompted.generate(generator, task, shots, [example.context])
        assert alone == [text], "a text must not depend on its batch"
