"""The demo, on its recipes with fewer epochs: it shows what its records say, and both adapted models have learned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lora_hf.cli.commands.demo import ASKED, RECIPE, WRITER_RECIPE
from lora_hf.core.config.loader import load_config
from lora_hf.core.records import RunRecord
from lora_hf.data.synthetic import rule_sentiment
from lora_hf.data.tasks.registry import get_task
from tests.support.command_lines import ask

EPOCHS = {RECIPE: 1, WRITER_RECIPE: 0.25}


def test_the_demo_ends_with_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe, epochs in EPOCHS.items():  # a recipe is looked for in the current folder first
        shorter = load_config(recipe, [f"train.epochs={epochs}"]).to_dict()
        (tmp_path / recipe).write_text(yaml.safe_dump(shorter), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    told = ask("demo", "--output", tmp_path)
    shown = told.stdout
    assert "three small trainings" in told.stderr.splitlines()[0]
    for words in ("always the commonest class", "only its head trained", "LoRA and head trained"):
        assert words in shown
    head, lora, writer = (
        RunRecord.load(tmp_path / f"demo-{name}" / "record.json") for name in ("head", "lora", "writer")
    )
    for record, recipe in ((head, RECIPE), (lora, RECIPE), (writer, WRITER_RECIPE)):
        assert record.config["train"]["epochs"] == EPOCHS[recipe]
    assert f"{lora.metrics['validation']['accuracy']:.3f}" in shown
    assert lora.metrics["validation"]["accuracy"] > head.metrics["validation"]["accuracy"] + 0.1 > 0.6

    right = {
        row["sentence"]: get_task("rule-sentiment").label_names[row["label"]] for row in rule_sentiment("validation")
    }
    answers = re.findall(r"^  ['\"](.+)['\"]: (\w+) \([\d.]+\)(, wrong)?$", shown, re.MULTILINE)
    assert len(answers) == ASKED
    for sentence, label, wrong in answers:
        assert bool(wrong) == (label != right[sentence])

    assert f"{writer.metrics['validation']['perplexity']:.3f}" in shown
    assert f"{writer.parameters['trainable']:,} (" in shown
    starts = ("input    name\\[([^]]+)", "base     (.+)", "LoRA     (.+)")
    names, before, after = (re.findall(f"^  {start}", shown, re.MULTILINE) for start in starts)
    assert len(names) == len(before) == len(after) == 3
    for name, base, adapted in zip(names, before, after, strict=True):
        assert name in adapted
        assert name not in base
