"""The demo with fewer epochs: it shows the values of its records, and both adapted models have learned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lora_hf.cli.commands import demo
from lora_hf.cli.commands.demo import CLASSIFIER_RECIPE, GENERATOR_RECIPE, PROMPTS, SENTENCES
from lora_hf.core.config.loader import load_config
from lora_hf.core.records import RunRecord
from lora_hf.data.synthetic import rule_sentiment
from lora_hf.data.tasks.registry import get_task
from tests.support.command_lines import ask

pytestmark = pytest.mark.full

EPOCHS = {CLASSIFIER_RECIPE: 1, GENERATOR_RECIPE: 0.25}


def test_the_demo_prints_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A recipe is looked for in the current folder first.
    shorter = load_config(CLASSIFIER_RECIPE, [f"train.epochs={EPOCHS[CLASSIFIER_RECIPE]}"]).to_dict()
    (tmp_path / CLASSIFIER_RECIPE).write_text(yaml.safe_dump(shorter), encoding="utf-8")
    monkeypatch.setattr(demo, "EPOCHS", EPOCHS[GENERATOR_RECIPE])
    monkeypatch.chdir(tmp_path)
    done = ask("demo", "--output", tmp_path)
    shown = done.stdout
    assert "two minutes" in done.stderr.splitlines()[0]
    for words in ("most frequent class", "head trained", "LoRA and head trained"):
        assert words in shown
    head, lora, writer = (
        RunRecord.load(tmp_path / f"demo-{name}" / "record.json") for name in ("head", "lora", "writer")
    )
    for record, recipe in ((head, CLASSIFIER_RECIPE), (lora, CLASSIFIER_RECIPE), (writer, GENERATOR_RECIPE)):
        assert record.config["train"]["epochs"] == EPOCHS[recipe]
    assert f"{lora.metrics['validation']['accuracy']:.3f}" in shown
    assert lora.metrics["validation"]["accuracy"] > head.metrics["validation"]["accuracy"] + 0.1 > 0.6

    right = {
        row["sentence"]: get_task("rule-sentiment").label_names[row["label"]] for row in rule_sentiment("validation")
    }
    answers = re.findall(r"^  ['\"](.+)['\"]: (\w+) \([\d.]+\)(, wrong)?$", shown, re.MULTILINE)
    assert len(answers) == SENTENCES
    for sentence, label, wrong in answers:
        assert bool(wrong) == (label != right[sentence])

    assert f"{writer.metrics['validation']['perplexity']:.3f}" in shown
    assert f"{writer.parameters['trainable']:,} (" in shown
    starts = ("input    name\\[([^]]+)", "base     (.+)", "LoRA     (.+)")
    names, before, after = (re.findall(f"^  {start}", shown, re.MULTILINE) for start in starts)
    assert len(names) == len(before) == len(after) == PROMPTS
    for name, base, adapted in zip(names, before, after, strict=True):
        assert name in adapted
        assert name not in base
