"""Model types that people bring train, and answer, from the command line: by role and by `all`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lora_hf.cli.main import main
from lora_hf.models.load import BUNDLED_FOLDER
from tests.support.small_models import small_config

TASKS = {"modernbert": "rule_sentiment.yaml", "qwen3": "rule_restaurants.yaml", "gemma3_text": "rule_restaurants.yaml"}
TASKS |= {"electra": "rule_sentiment.yaml", "megatron-bert": "rule_sentiment.yaml"}
FAST = (("modernbert", "all"),)
CASES = [
    pytest.param(kind, targets, marks=() if (kind, targets) in FAST else pytest.mark.full)
    for kind in TASKS
    for targets in ("all", "[q, v]")
]


@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_it_trains_and_answers(kind: str, targets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writes = TASKS[kind] == "rule_restaurants.yaml"
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_FOLDER / ("tiny-gpt2" if writes else "tiny-roberta"))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = small_config(kind, vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=pad, **ids)
    torch.manual_seed(0)
    (AutoModelForCausalLM if writes else AutoModel).from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = [
        f"model.name={tmp_path / 'base'}",
        "model.precision=fp32",
        f"lora.targets={targets}",
        "train.max_steps=2",
    ]
    options += [
        "train.batch_size=4",
        "task.max_length=128",
        f"output.dir={tmp_path}",
        "output.plots=false",
        "output.name=run",
    ]
    assert main(["train", "--config", TASKS[kind], "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(tmp_path / "run")
    adapter = ["--adapter", str(tmp_path / "run/adapter")]
    if writes:
        assert main(["generate", *adapter, "--prompt", "name[Aromi]", "--max-new-tokens", "2"]) == 0
    else:
        assert main(["predict", *adapter, "--text", "A warm film."]) == 0
        assert json.loads(capsys.readouterr().out)["label"] in ("negative", "positive")
