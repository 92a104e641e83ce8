"""A chat task through train, chat, generate, eval and merge, with a small random model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.records import RunRecord
from lora_hf.inference.generate import Generator
from tests.support.chats import CHATML, chat_tokenizer, save_chat_model, taught_rows, write_rows
from tests.support.command_lines import ask, last_json

RUN = ["train.max_steps=2", "train.batch_size=4", "train.lr=1e-2", "model.precision=fp32", "generate.max_new_tokens=8"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    base = save_chat_model(folder / "base", chat_tokenizer(None))
    write_rows(folder / "data/train.jsonl", taught_rows(12))
    write_rows(folder / "data/validation.jsonl", taught_rows(4, seed=1))
    (folder / "own.jinja").write_text(CHATML.replace("<|im_start|>", "</s>"))
    task = f"{{name: shop, kind: chat, data_dir: {folder / 'data'}, chat_template: {folder / 'own.jinja'}}}"
    (folder / "shop.yaml").write_text(f"model: {{name: {base}}}\ntask: {task}\n")
    words = ["--config", folder / "shop.yaml", *RUN, f"output.dir={folder}", "output.plots=false", "output.name=run"]
    ask("train", *words)
    (folder / "own.jinja").unlink()  # the run holds the template itself
    return folder / "run/adapter"


def test_a_run_scores_the_replies(adapter: Path) -> None:
    record = RunRecord.load(adapter.parent / "record.json")
    assert record.metrics["validation"]["perplexity"] > 1
    assert "</s>" in record.config["task"]["chat_template"]


def test_without_a_template_the_run_ends_before_training(adapter: Path) -> None:
    config = adapter.parent.parent / "shop.yaml"
    words = [
        "--config",
        config,
        *RUN,
        f"output.dir={adapter.parent.parent}",
        "output.plots=false",
        "output.name=none",
        "task.chat_template=null",
    ]
    told = ask("train", *words, code=2).stderr
    assert "has no chat template" in told
    assert "task.chat_template=chatml" in told


def talk(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, lines: list[str], *words: str, code: int = 0
) -> tuple[str, list[dict[str, Any]]]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    done = ask("chat", "--adapter", adapter, "--json", *words, code=code)
    return (done.stdout, last_json(done)["messages"]) if code == 0 else (done.stderr, [])


def test_the_console_answers_each_line_as_generate_does(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, messages = talk(monkeypatch, adapter, ["Xin chào", "", "Again?"], "--system", "Be brief.")
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert printed.startswith(f"{messages[2]['content']}\n{messages[4]['content']}\n")
    generator = Generator.load(find_saved_model(adapter))
    task: Any = generator.task
    (again,) = generator.generate([task.conversation(messages[:4])], GenerateConfig(max_new_tokens=8))
    assert again.text == messages[4]["content"]


def test_sampled_replies_follow_the_seed(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (
        talk(monkeypatch, adapter, ["one", "/reset", "one"], "--temperature", "3", "--seed", seed) for seed in "334"
    )
    assert first == again
    assert first[1] != other[1]
    printed, (_, reply) = first
    assert not printed.startswith(f"{reply['content']}\n"), "each turn has draws of its own"


def test_reset_and_exit(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, messages = talk(monkeypatch, adapter, ["one", "/reset", "two", "/exit", "three"], "--system", "S")
    assert [each["content"] for each in messages if each["role"] != "assistant"] == ["S", "two"]


def test_a_conversation_that_is_too_long_ends_a_piped_chat(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = talk(monkeypatch, adapter, ["x" * 3000], code=2)
    assert "the model reads at most" in told


def test_beams_are_refused_for_a_stream(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = talk(monkeypatch, adapter, ["x"], "--num-beams", "2", code=2)
    assert "--num-beams 2: beam search has no text to stream" in told


def test_generate_takes_messages_and_prompts(adapter: Path, tmp_path: Path) -> None:
    rows = taught_rows(3, seed=2)
    file = write_rows(tmp_path / "ask.jsonl", rows)
    done = ask("generate", "--adapter", adapter, "--input", file, "--json")
    texts = last_json(done)["texts"]
    assert [each["prompt"] for each in texts] == [row["messages"][:-1] for row in rows], "the last reply is made anew"
    assert "3 of 3 conversations end with a reply" in done.stderr
    single = last_json(ask("generate", "--adapter", adapter, "--prompt", "Hi", "--json"))["texts"][0]
    (tmp_path / "ask.txt").write_text("Hi\nyou\n")
    lines = last_json(ask("generate", "--adapter", adapter, "--input", tmp_path / "ask.txt", "--json"))["texts"]
    assert (lines[0], lines[1]["prompt"]) == (single, "you")
    write_rows(tmp_path / "wrong.jsonl", [{"messages": [{"role": "user"}]}])
    told = ask("generate", "--adapter", adapter, "--input", tmp_path / "wrong.jsonl", code=2).stderr
    assert "wrong.jsonl: 1 of 1 rows are wrong, the first is row 0" in told


def test_eval_writes_conversations(adapter: Path, without_java: None) -> None:
    folder = adapter.parent.parent / "data"
    scores = last_json(ask("eval", "--adapter", adapter, "--data-dir", folder, "--json"))["metrics"]["validation"]
    assert "BLEU" in scores
    lines = (adapter.parent / "outputs-validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["input"][-1]["role"] == "user"
    assert "Captain" in json.loads(lines[0])["references"][0]


def test_a_merged_model_brings_the_template(adapter: Path, tmp_path: Path) -> None:
    ask("merge", "--adapter", adapter, "--output", tmp_path / "merged")
    assert "</s>" in AutoTokenizer.from_pretrained(tmp_path / "merged").get_chat_template()
    one, other = (
        last_json(ask("generate", "--adapter", each, "--prompt", "Hi", "--json"))["texts"]
        for each in (adapter, tmp_path / "merged")
    )
    assert one[0]["text"] == other[0]["text"]


def test_chat_is_for_chats(adapter: Path, tmp_path: Path) -> None:
    from tests.support.random_adapters import save_random

    save_random(tmp_path / "adapter", "sst2")
    assert "use predict instead" in ask("chat", "--adapter", tmp_path / "adapter", code=2).stderr


def test_a_reply_stops_at_the_end_of_its_turn(adapter: Path) -> None:
    """The model's own end token is another one, and so is the tokenizer's."""
    generator = Generator.load(find_saved_model(adapter))
    end, reply = generator.tokenizer.convert_tokens_to_ids(["<|im_end|>", "a"])
    generator.tokenizer.eos_token = "<s>"
    assert end in generator.task.end_tokens(generator.tokenizer)
    assert end not in {generator.tokenizer.eos_token_id, generator.model.config.eos_token_id}
    script = [reply, reply, end, reply]

    def scripted(input_ids: torch.Tensor, **named: Any) -> Any:
        output = forward(input_ids=input_ids, **named)
        output.logits[:, -1] = -100.0
        output.logits[:, -1, script.pop(0)] = 0.0
        return output

    forward, generator.model.forward = generator.model.forward, scripted  # type: ignore[method-assign]
    pieces: list[str] = []
    text = generator.reply(generator.task.context("Hi"), GenerateConfig(max_new_tokens=8), pieces.append)
    assert text.text == "".join(pieces) == "aa"
    assert script == [reply], "nothing is generated after the end"
