"""Every `--text` and every `--prompt` gets an answer, and no other option is given twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_hf import inject, save_adapter
from lora_hf.cli.main import main
from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.data.tasks.registry import get_task
from lora_hf.models.load import load_base, load_tokenizer
from tests.support.adapters_on_disk import run_folder
from tests.support.command_lines import ask, last_json
from tests.support.small_models import randomize_lora_b

TEXTS = ["a warm, funny film", "a dull mess", "a warm, funny film"]
PROMPTS = ["name[The Vaults], eatType[pub]", "name[Aromi], food[Italian]"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, task = ModelConfig(name="tiny-gpt2", precision="fp32"), get_task("rule-restaurants")
    model = inject(load_base(base, task), LoraConfig(r=2, targets=("q", "v")))
    randomize_lora_b(model)
    return save_adapter(model, tmp_path_factory.mktemp("w") / "a", task=task.name, tokenizer=load_tokenizer(base))


def test_every_text_is_answered_in_order(classifier: Path) -> None:
    words = [word for text in TEXTS for word in ("--text", text)]
    lines = [json.loads(line) for line in ask("predict", "--adapter", classifier, *words).stdout.splitlines()]
    assert [line["sentence"] for line in lines] == TEXTS
    for line, text in zip(lines, TEXTS, strict=True):
        assert line == json.loads(ask("predict", "--adapter", classifier, "--text", text).stdout)


def test_every_prompt_is_answered_in_order(writer: Path) -> None:
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    quick = ["--max-new-tokens", "6", "--num-beams", "1", "--json"]
    texts = last_json(ask("generate", "--adapter", writer, *words, *quick))["texts"]
    assert [text["prompt"] for text in texts] == PROMPTS
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert [text] == last_json(ask("generate", "--adapter", writer, "--prompt", prompt, *quick))["texts"]


def test_one_empty_text_among_others_is_refused(classifier: Path) -> None:
    words = ["--text", "a film", "--text", " "]
    assert "--text: expected a text" in ask("predict", "--adapter", classifier, *words, code=2).stderr


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--adapter", "a", "--text", "x", "--output", "one.jsonl", "--output", "two.jsonl"],
        ["generate", "--adapter", "a", "--adapter", "b", "--prompt", "x"],
        ["eval", "--adapter", "a", "--split", "test", "--split", "validation"],
        ["train", "--config", "a.yaml", "--resume", "auto", "--resume", "checkpoint-4"],
        ["benchmark", "glue", "--seeds", "0", "--seeds", "1"],
        ["merge", "--adapter", "a", "--output", "b", "--dtype", "fp32", "--dtype", "bf16"],
    ],
)
def test_an_option_that_has_one_value_is_refused_twice(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "give it once" in capsys.readouterr().err


def test_an_option_may_be_given_again_in_the_next_command(classifier: Path) -> None:
    for _ in range(2):
        ask("predict", "--adapter", classifier, "--text", "a film", "--precision", "fp32")
