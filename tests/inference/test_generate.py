"""Texts from a small random model: what a row gets must not depend on its batch, and a score must be what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.generate import GeneratedText, Generator, text_limit, write_texts
from lora_hf.inference.logits import NoRepeatedNGram
from lora_hf.inference.text_files import check_text_files
from lora_hf.training.trainer import completion_loss
from tests.support.small_models import small_model
from tests.tolerances import PARITY_FP32

TASK = get_task("e2e_nlg")
DECODINGS = {
    "greedy": GenerateConfig(max_new_tokens=12),
    "beam": GenerateConfig(max_new_tokens=12, num_beams=4, length_penalty=0.9, no_repeat_ngram_size=3),
}


@pytest.fixture(scope="module")
def generator(models_dir: Path) -> Generator:
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "gpt2-tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    model = small_model("gpt2", vocab_size=len(tokenizer), n_positions=128, initializer_range=0.5, **ids)
    return Generator(model, tokenizer, TASK, 128)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def contexts(data_dir: Path) -> list[str]:
    rows = TASK.load(str(data_dir), ["test"])["test"]
    return [example.context for example in TASK.groups(rows)][:64]  # type: ignore[attr-defined]


@pytest.mark.full
@pytest.mark.parametrize("name", DECODINGS)
def test_a_text_does_not_depend_on_its_batch(name: str, generator: Generator, contexts: list[str]) -> None:
    values = DECODINGS[name].__dict__
    at_once = list(generator.generate(contexts, GenerateConfig(**{**values, "batch_size": 64})))
    alone = list(generator.generate(contexts, GenerateConfig(**{**values, "batch_size": 1})))
    assert [one.text for one in at_once] == [one.text for one in alone]
    assert [one.score for one in at_once] == pytest.approx([one.score for one in alone], abs=2e-3)
    assert len({one.text for one in alone}) > 1, "one text for all inputs would prove nothing"


def test_the_score_of_a_greedy_text_is_its_mean_log_probability(generator: Generator, contexts: list[str]) -> None:
    (made,) = generator.generate(contexts[:1], GenerateConfig(max_new_tokens=5))
    (prompt,) = TASK.prompts(contexts[:1], generator.tokenizer, 100)  # type: ignore[attr-defined]
    ids, chances = list(prompt), []
    with torch.no_grad():
        for _ in range(5):
            chance, token = generator.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
            chances.append(float(chance))
            ids.append(int(token))
            if ids[-1] == generator.tokenizer.eos_token_id:
                break
    assert made.score == pytest.approx(sum(chances) / len(chances), abs=1e-3)
    text = generator.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert made.text == " ".join(text.split())


@pytest.mark.parametrize("name", DECODINGS)
def test_a_decoder_is_decoded_by_our_settings_alone(
    name: str, generator: Generator, contexts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5's generation_config has a repetition penalty, which the server's running batch has never read."""
    expected = list(generator.generate(contexts[:3], DECODINGS[name]))
    settings = {"repetition_penalty": 9.0, "min_length": 60, "suppress_tokens": list(range(40_000)), "num_beams": 2}
    settings |= {"no_repeat_ngram_size": 1, "forced_eos_token_id": 40_001, "max_length": 3, "length_penalty": -2.0}
    monkeypatch.setattr(generator.model, "generation_config", GenerationConfig(**settings))
    assert list(generator.generate(contexts[:3], DECODINGS[name])) == expected
    assert generator.model.generation_config.repetition_penalty == 9.0


@pytest.mark.full
def test_sampling_follows_its_seed(generator: Generator, contexts: list[str]) -> None:
    def sample(seed: int) -> list[str]:
        decoding = GenerateConfig(max_new_tokens=8, do_sample=True, top_p=0.95, temperature=1.5, seed=seed)
        return [made.text for made in generator.generate(contexts[:8], decoding)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_n_grams_of_the_prompt_may_be_written() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6]])
    for width, banned in ((0, True), (4, False)):
        scores = NoRepeatedNGram(3, width)(ids, torch.zeros(1, 10))  # type: ignore[arg-type]
        assert bool(scores[0, 7] == -float("inf")) == banned, "5 6 7 stands in the first four tokens"
    scores = NoRepeatedNGram(2, 2)(torch.tensor([[1, 2, 3, 4, 3]]), torch.zeros(1, 10))  # type: ignore[arg-type]
    assert scores[0, 4] == -float("inf"), "3 4 stands in the text itself"


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_made(generator: Generator) -> None:
    long = TASK.context(f"name[{'The Vaults ' * 60}]")  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"prompt 1 \(counting from 0\) has \d+ tokens.*reads at most 64"):
        generator.generate(["name : A", long], GenerateConfig(max_new_tokens=64))


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("gpt2", {"n_positions": 70}, 70),
        ("gemma3", {"text_config": {"max_position_embeddings": 70}}, 70),
        ("bloom", {}, 50),
        ("bart", {"max_position_embeddings": 70}, 50),
        ("bart", {"max_position_embeddings": 30}, 30),
        ("t5", {}, 50),
    ],
)
def test_the_limit_of_a_text(kind: str, settings: dict[str, Any], limit: int) -> None:
    model: Any = SimpleNamespace(config=AutoConfig.for_model(kind, **settings))
    assert text_limit(model, 50) == limit


def test_the_loss_of_a_completion_by_hand() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[-100, -100, 3, 5], [-100, 2, 1, -100]])
    chances = logits.log_softmax(-1)
    by_hand = [
        [-float(chances[0, 1, 3] + chances[0, 2, 5]), 2.0],
        [-float(chances[1, 0, 2] + chances[1, 1, 1]), 2.0],
    ]
    assert torch.allclose(completion_loss(logits, labels), torch.tensor(by_hand), atol=PARITY_FP32)


def test_texts_and_scores_are_written_in_order(tmp_path: Path) -> None:
    made = write_texts(
        tmp_path / "out.txt", ["a", "b"], iter([GeneratedText("eins", -1.0), GeneratedText("zwö", -2.0)])
    )
    assert [one.text for one in made] == ["eins", "zwö"]
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "eins\nzwö\n"
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {"prompt": "b", "text": "zwö", "score": -2.0}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "out.txt"]


@pytest.mark.parametrize("output", ["a.txt", "a.jsonl", "a.csv", "a", "elsewhere/../a.txt"])
def test_an_output_that_would_replace_its_prompts_is_refused(output: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_texts(tmp_path / output, ["a"], iter([GeneratedText("one", -1.0)]))
    written = {file.name for file in tmp_path.iterdir() if file.is_file()}
    assert len(written) == 2
    for name in ("a", "a.txt", "a.jsonl", "a.csv", "b.jsonl"):
        if name in written:
            with pytest.raises(ConfigError, match=r"--output .*a.* is the --input file"):
                check_text_files(tmp_path / output, tmp_path / name)
        else:
            check_text_files(tmp_path / output, tmp_path / name)


def test_an_interruption_keeps_what_it_had_and_the_older_file(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("old\n")

    def stopped() -> Iterator[GeneratedText]:
        yield GeneratedText("first", -1.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_texts(tmp_path / "out.txt", ["a", "b"], stopped())
    assert (tmp_path / "out.txt").read_text() == "old\n"
    assert (tmp_path / "out.txt.part").read_text() == "first\n"
