"""What the pages tell people to type: every Python block and every convert command, in order, on the embedded bases."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lora_hf.adapters import load_adapter
from lora_hf.benchmark.peers import with_loralib
from lora_hf.cli import main
from lora_hf.config import LoraConfig, ModelConfig
from lora_hf.injection import lora_state_dict
from lora_hf.models import EMBEDDED_FOLDER, load_base
from lora_hf.tasks.table import get_task
from tests.small import token_ids
from tests.tolerances import PARITY_FP32

REPO = Path(__file__).parents[2]
STAND_INS = {
    "FacebookAI/roberta-base": str(EMBEDDED_FOLDER / "tiny-roberta"),
    "openai-community/gpt2-medium": str(EMBEDDED_FOLDER / "tiny-gpt2"),
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block, the bases of the hub replaced by ours."""
    text = page.read_text(encoding="utf-8")
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    return re.findall(r"^```(python|bash)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run_page(page: Path) -> dict[str, Any]:
    """Runs the page in the current folder; returns the names that its Python blocks leave behind."""
    names: dict[str, Any] = {"batches": [{"input_ids": token_ids(), "labels": torch.tensor([0, 1, 1])}] * 2}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "scripts/convert.py"]:
                assert main(words[2:], verb="convert") == 0, line
    return names


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(REPO / "README.md")
    model, plain = (names[name].eval() for name in ("model", "plain"))
    assert torch.equal(plain(token_ids()).logits, model(token_ids()).logits)


def test_from_loralib_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpt2 = load_base(ModelConfig(name="tiny-gpt2", precision="fp32"), get_task("e2e_nlg"))
    with_loralib(gpt2, LoraConfig(r=4, lora_alpha=32, targets=("q", "v")))
    torch.save(
        {"model_state_dict": {k: v for k, v in gpt2.state_dict().items() if "lora_" in k}}, "gpt2_md_lora_e2e.pt"
    )
    names = run_page(REPO / "docs" / "from_loralib.md")
    old, back = torch.load("roberta_lora_sst2.bin"), torch.load("back.bin")
    assert old.keys() == back.keys()
    assert all(torch.equal(old[key], back[key]) for key in old)
    assert any(value.any() for key, value in old.items() if key.endswith("lora_B")), "the old script must have trained"
    assert [name for name in lora_state_dict(names["model"]) if ".biased." in name]


def test_from_peft_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(REPO / "docs" / "from_peft.md")
    theirs = names["peft_model"].eval()(token_ids()).logits
    plain = AutoModelForSequenceClassification.from_pretrained(EMBEDDED_FOLDER / "tiny-roberta", num_labels=2)
    ours = load_adapter(plain, "peft-adapter").eval()(token_ids()).logits
    assert torch.allclose(ours, theirs, atol=PARITY_FP32, rtol=0)
    assert (tmp_path / "merged-model" / "model.safetensors").is_file()
