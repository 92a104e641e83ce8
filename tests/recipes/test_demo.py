"""`make demo`, as a subprocess: it shows what its records say, and both adapted models have learned something."""

from __future__ import annotations

import re
from pathlib import Path

from lora_hf.records import RunRecord
from tests.recipes.test_commands import run


def test_the_demo_ends_with_its_table(tmp_path: Path) -> None:
    shown = run("demo", "--output", tmp_path).stdout
    for words in ("always the commonest class", "only its head trained", "LoRA and head trained"):
        assert words in shown
    head, lora, writer = (
        RunRecord.load(tmp_path / f"demo-{name}" / "record.json") for name in ("head", "lora", "writer")
    )
    assert f"{lora.metrics['validation']['accuracy']:.3f}" in shown
    assert lora.metrics["validation"]["accuracy"] > head.metrics["validation"]["accuracy"] + 0.1 > 0.6

    assert f"{writer.metrics['validation']['perplexity']:.3f}" in shown
    assert f"{writer.parameters['trainable']:,} (" in shown
    starts = ("input    name\\[([^]]+)", "base     (.+)", "LoRA     (.+)")
    names, before, after = (re.findall(f"^  {start}", shown, re.MULTILINE) for start in starts)
    assert len(names) == len(before) == len(after) == 3
    for name, base, adapted in zip(names, before, after, strict=True):
        assert name in adapted
        assert name not in base
