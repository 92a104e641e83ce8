"""Pretraining on an invented language: it learns, resumes exactly, and exports a folder that transformers loads."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_hf.core.errors import UserError
from tools.tiny import corpus, pretrain, recipes
from tools.tiny.pretrain import BASES
from tools.tiny.recipes import RECIPES, Recipe, make_tokenizer

pytestmark = pytest.mark.full

SMALL = {
    "hidden_size": 32,
    "layers": 1,
    "heads": 2,
    "positions": 48,
    "tokens": 80 * 512,
    "plain_tokens": 6 * 512,
    "batch_tokens": 512,
    "lengths": ((16, 0.5), (48, 0.5)),
    "warmup_steps": 5,
    "check_steps": 20,
}
RECIPE = {kind: replace(RECIPES[name], vocab_size=size, **SMALL) for kind, name, size in (
    ("masked", "tiny-roberta", 150), ("causal", "tiny-gpt2", 330)
)}  # fmt: skip
BUNDLED_BYTES = 16_000_000  # limit for both bases together


def sentence(draw: random.Random) -> str:
    """A language where the animal determines the verb and the location, so that context predicts a masked word."""
    animal, verb, location = draw.choice(
        [("dog", "runs", "garden"), ("cat", "sleeps", "kitchen"), ("fish", "swims", "river"), ("bird", "flies", "sky")]
    )
    article, color = draw.choice(["A", "The", "Your"]), draw.choice(["black", "white", "brown", "old"])
    return f"{article} {color} {animal} {verb} in the {color} {location}{draw.choice(['.', '!'])}"


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for file, documents in (("train-0000", 30), ("train-0001", 30), ("validation", 12)):
        rows = [
            (f"{file} {document}", " ".join(sentence(draw) for _ in range(4)))
            for document in range(documents)
            for _ in "1234"
        ]
        sources, texts = zip(*rows, strict=True)
        parquet.write_table(arrow.table({"source": sources, "text": texts}), folder / f"{file}.parquet")
    return folder


@pytest.fixture(scope="module", params=["masked", "causal"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPE[request.param]


@pytest.fixture(scope="module")
def corpora(
    recipe: Recipe, text_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[corpus.Corpus, corpus.Corpus]:
    files = {split: corpus.text_files(text_dir, split) for split in ("train", "validation")}
    tokenizer = make_tokenizer(recipe, files["train"], tmp_path_factory.mktemp("tokenizer")).backend_tokenizer
    encode = corpus.encode_masked if recipe.kind == "masked" else corpus.encode_causal
    return encode(files["train"], tokenizer), encode(files["validation"], tokenizer)


def unigram_entropy(stream: np.ndarray) -> float:
    shares = np.bincount(stream) / len(stream)
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def test_learns_more_than_word_frequencies_and_exports(recipe: Recipe, text_dir: Path, tmp_path: Path) -> None:
    record = pretrain.pretrain("small", recipe, text_dir, tmp_path / "work", tmp_path / "base", resume=False)
    entropy = unigram_entropy(np.load(tmp_path / "work" / "validation.stream.npy"))
    assert record["held_out_loss"] < 0.75 * entropy
    assert record["trained_tokens"] == recipe.tokens + recipe.plain_tokens
    assert set(record["text"]) == {"train-0000.parquet", "train-0001.parquet", "validation.parquet"}

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    batch = tokenizer(["The dog runs."], ["A cat!"], return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == recipe.positions
    auto = AutoModelForMaskedLM if recipe.kind == "masked" else AutoModelForCausalLM
    for loader in (auto, AutoModelForSequenceClassification):
        model = loader.from_pretrained(tmp_path / "base")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model(**batch).logits.isfinite().all()


def test_a_resumed_run_equals_an_uninterrupted_one(
    recipe: Recipe, corpora: tuple[corpus.Corpus, corpus.Corpus], tmp_path: Path
) -> None:
    recipe = replace(recipe, tokens=24 * recipe.batch_tokens, check_steps=6)
    uninterrupted, progress = pretrain.train(recipe, corpora, tmp_path / "uninterrupted")
    pretrain.train(recipe, corpora, tmp_path / "parts", stop_step=12)
    # As if killed between the two renames.
    shutil.rmtree(tmp_path / "parts" / "checkpoint.old")
    (tmp_path / "parts" / "checkpoint").rename(tmp_path / "parts" / "checkpoint.old")
    resumed, resumed_progress = pretrain.train(recipe, corpora, tmp_path / "parts", resume=True)
    assert resumed_progress.history == progress.history
    for (name, expected), found in zip(uninterrupted.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_more_tokens_change_nothing_before_the_decay(
    recipe: Recipe, corpora: tuple[corpus.Corpus, corpus.Corpus], tmp_path: Path
) -> None:
    short = replace(recipe, tokens=16 * recipe.batch_tokens)
    first, _ = pretrain.train(short, corpora, tmp_path / "short", stop_step=8)
    second, _ = pretrain.train(replace(short, tokens=4 * short.tokens), corpora, tmp_path / "long", stop_step=8)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_learning_rate_and_mask_rate_follow_the_schedule() -> None:
    recipe = replace(RECIPE["masked"], tokens=100 * 512, plain_tokens=20 * 512, warmup_steps=10, decay_share=0.4)
    scales = [recipe.learning_rate_scale(step) for step in (0, 9, 60, 80, 100, 110, 120)]
    assert scales == pytest.approx([0.1, 1, 1, 0.5, 0.2, 0.1, 0])
    assert [recipe.mask_rate(step) for step in (0, 60, 80, 100)] == pytest.approx([0.3, 0.3, 0.225, 0.15])


def test_blocks_cover_the_text_and_begin_at_starts() -> None:
    starts = np.arange(0, 10_000, 10)
    text = corpus.Corpus(np.arange(10_000, dtype=np.uint16), starts)
    chosen = torch.cat([corpus.blocks(text, rows=8, length=20, step=step)[:, 0] for step in range(200)])
    assert set(chosen.tolist()) <= set(starts.tolist())
    # Of 1600 draws. Random draws would reach 0.80, and the same positions in every step 0.008.
    assert len(set(chosen.tolist())) > 0.75 * len(starts)
    assert torch.equal(corpus.blocks(text, 8, 20, 7), corpus.blocks(text, 8, 20, 7))
    with pytest.raises(UserError, match=r"10000 tokens.*20000"):
        corpus.blocks(text, 8, 20_000, 0)


def test_missing_text_files_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tiny-gpt2", "--text-dir", str(tmp_path), "--work-dir", str(tmp_path / "work")]
    assert pretrain.main(options) == 2
    assert f"train-*.parquet in {tmp_path}" in capsys.readouterr().err


def test_sinusoidal_positions_encode_distances() -> None:
    waves = recipes.waves(40, 16)
    similarity = waves @ waves.T
    assert waves[0].tolist() == [0.0, 1.0] * 8
    assert similarity.diagonal(3).tolist() == pytest.approx([similarity[0, 3].item()] * 37, abs=1e-4)
    assert similarity[0, 1] > similarity[0, 4]


def test_words_that_occur_together_have_similar_vectors() -> None:
    draw = np.random.default_rng(0)
    # Words 0-4 and 5-9 never mix, so vectors must be more similar within a group than between groups.
    stream = np.concatenate([draw.integers(0, 5, 50) + 5 * (number % 2) for number in range(100)]).astype(np.uint16)
    vectors = corpus.cooccurrence_embeddings(stream, vocab_size=10, size=4, seed=0)
    similarity = vectors @ vectors.T
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 10)
    assert similarity[:5, :5].min() > similarity[:5, 5:].max()


def bases() -> list[Path]:
    return sorted(folder for folder in BASES.glob("*") if (folder / "model.safetensors").exists())


def test_bundled_bases_stay_small() -> None:
    assert sum((folder / "model.safetensors").stat().st_size for folder in bases()) <= BUNDLED_BYTES


@pytest.mark.parametrize("folder", bases(), ids=lambda folder: folder.name)
def test_a_bundled_base_was_trained_with_its_current_recipe(folder: Path) -> None:
    record = json.loads((folder / "pretraining.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(asdict(RECIPES[folder.name])))
    assert math.exp(record["held_out_loss"]) == pytest.approx(record["held_out_perplexity"], abs=0.01)


TREEBANK = "do n't you see it 's a `` charming '' , -lrb- funny -rrb- film ."
PLAIN = "Don't you see it's a \"charming\", (funny) film."


@pytest.mark.skipif(not (BASES / "tiny-roberta").exists(), reason="the base is missing")
class TestTinyRoberta:
    folder = BASES / "tiny-roberta"

    def test_treebank_spacing_makes_no_difference(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        tokens = tokenizer.tokenize(TREEBANK)
        assert tokens == tokenizer.tokenize(PLAIN)
        assert " ".join(tokens) == "do n't you see it 's a \" charming \" , ( funny ) film ."

    def test_special_tokens(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        assert tokenizer.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        pair = tokenizer("a", "b")
        assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["<s>", "a", "</s>", "</s>", "b", "</s>"]
        assert len(tokenizer("film " * 600, truncation=True)["input_ids"]) == 512

    def test_longest_input_runs(self) -> None:
        model = AutoModelForMaskedLM.from_pretrained(self.folder)
        assert model(torch.full((1, 512), 10)).logits.isfinite().all()

    @pytest.mark.parametrize(
        ("sentence", "expected"),
        [
            ("He did <mask> know what to say.", {"not", "n't"}),
            ("He opened the <mask> and went into the room.", {"door"}),
        ],
    )
    def test_fills_masks_with_plausible_words(self, sentence: str, expected: set[str]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model = AutoModelForMaskedLM.from_pretrained(self.folder)
        batch = tokenizer(sentence, return_tensors="pt")
        position = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
        best = tokenizer.convert_ids_to_tokens(model(**batch).logits[0, position].topk(5).indices.tolist())
        assert expected & set(best), best


@pytest.mark.skipif(not (BASES / "tiny-gpt2").exists(), reason="the base is missing")
class TestTinyGpt2:
    folder = BASES / "tiny-gpt2"

    @pytest.mark.parametrize("written", [TREEBANK, PLAIN, "Zürich: 12 °C,\n\ttabs, and  spaces - 漢字"])
    def test_tokenizer_is_lossless(self, written: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        assert tokenizer.decode(tokenizer(written)["input_ids"]) == written
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id == 0

    def test_continues_a_sentence(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        batch = tokenizer("<|endoftext|>The President of the United", return_tensors="pt")
        best = model(**batch).logits[0, -1].argmax().item()
        assert tokenizer.decode([best]) == " States"
