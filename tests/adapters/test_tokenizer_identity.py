"""An adapter knows the tokenizer that it was trained with, and no verb encodes texts for it with another one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_hf.adapters.combine import combine_saved
from lora_hf.adapters.format import read_adapter, read_adapter_config, write_adapter
from lora_hf.adapters.merge import merge_adapter
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import AdapterError
from lora_hf.inference.classify import MultiAdapterPredictor, Predictor
from lora_hf.models.load import BUNDLED_FOLDER, load_tokenizer
from lora_hf.models.tokenizer_identity import _digests, tokenizer_identity
from lora_hf.serving.engine import Engine
from lora_hf.training.run import train
from tests.support.adapters_on_disk import TASK, run_folder
from tests.support.kills import small_config, small_rows
from tests.support.tokenizers_by_kind import SPECIAL, tokenizer_of

TEXTS = {TASK.text_columns[0]: ["a warm, funny film"]}


def digest(tokenizer: Any) -> str:
    return tokenizer_identity(tokenizer)["sha256"]


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_tokenizer_that_is_moved_and_saved_again_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    before = digest(tokenizer)
    tokenizer(["a", "a film"], padding=True, truncation=True, max_length=3)  # leaves its state behind
    tokenizer.model_max_length, tokenizer.model_input_names = 16, ["input_ids"]
    assert digest(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "moved")
    _digests.clear()  # computes it again
    again = AutoTokenizer.from_pretrained(tmp_path / "moved")
    assert digest(again) == before
    again.pad_token = again.eos_token or again.pad_token
    assert digest(again) == before, "padding is masked"


@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-gpt2"])
def test_the_bundled_tokenizers_too(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name=name))
    tokenizer.save_pretrained(tmp_path)
    assert digest(load_tokenizer(ModelConfig(name=str(tmp_path)))) == digest(tokenizer)
    assert tokenizer_identity(tokenizer)["name"] == name


def _swapped(state: dict[str, Any]) -> None:
    vocabulary = state["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _without_a_merge(state: dict[str, Any]) -> None:
    state["model"]["merges"].pop()


def _cased(state: dict[str, Any]) -> None:
    state["normalizer"]["lowercase"] = False


def _without_ends(state: dict[str, Any]) -> None:
    state["post_processor"] = None


def _at_spaces(state: dict[str, Any]) -> None:
    state["pre_tokenizer"] = {"type": "WhitespaceSplit"}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("bert", _swapped),
        ("bert", _cased),
        ("bert", _without_ends),
        ("bert", _at_spaces),
        ("gpt2", _without_a_merge),
        ("gpt2", _swapped),
        ("llama", _without_ends),
        ("roberta", _without_ends),
    ],
)
def test_a_tokenizer_that_encodes_otherwise_is_another(
    kind: str, change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert digest(AutoTokenizer.from_pretrained(tmp_path)) != digest(tokenizer)


def test_another_end_token_or_side_is_another() -> None:
    before = digest(tokenizer_of("llama"))
    for key, value in (("eos_token", "<unk>"), ("truncation_side", "left")):
        other = tokenizer_of("llama")
        setattr(other, key, value)
        assert digest(other) != before


def test_a_tokenizer_that_was_hashed_before_it_changed_is_hashed_again() -> None:
    tokenizer = tokenizer_of("bert")
    before = digest(tokenizer)
    tokenizer.add_tokens(["zyzzyva"])
    assert digest(tokenizer) != before


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of its own, whose tokenizer a test may change."""
    return Path(shutil.copytree(BUNDLED_FOLDER / "tiny-roberta", tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("run"), str(base))


@pytest.fixture
def permuted(base: Path, tmp_path: Path) -> Path:
    """The same base with another tokenizer."""
    folder = Path(shutil.copytree(base, tmp_path / "permuted"))
    state = json.loads((folder / "tokenizer.json").read_text())
    special = {each["id"] for each in state["added_tokens"]}
    words = [word for word, number in state["model"]["vocab"].items() if number not in special]
    numbers = [state["model"]["vocab"][word] for word in words]
    state["model"]["vocab"] |= dict(zip(words, numbers[1:] + numbers[:1], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def _start_from(adapter: Path, model: Path, folder: Path) -> None:
    config = small_config(folder, start_from=str(adapter), max_steps=1)
    lora = replace(config.lora, lora_alpha=8, targets=("q", "v"))
    train(replace(config, model=replace(config.model, name=str(model)), lora=lora), rows=small_rows())


def _serve(adapter: Path, model: Path, folder: Path) -> None:
    with Engine(precision="fp32", model=str(model)) as engine:
        engine.load("a", adapter)


VERBS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "predict": lambda adapter, model, _: Predictor.load(find_saved_model(adapter, model=str(model))),
    "predict several": lambda adapter, model, _: MultiAdapterPredictor.load(
        {"a": find_saved_model(adapter, model=str(model)), "b": find_saved_model(adapter, model=str(model))}
    ),
    "serve": _serve,
    "merge": lambda adapter, model, folder: merge_adapter(find_saved_model(adapter, model=str(model)), folder / "out"),
    "combine": lambda adapter, model, folder: combine_saved(
        [(adapter, 0.5), (adapter, 0.5)], folder / "out", model=str(model)
    ),
    "train": _start_from,
}


@pytest.mark.parametrize("verb", VERBS)
def test_another_tokenizer_is_an_error_that_names_both(
    verb: str, adapter: Path, base: Path, permuted: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="was trained with the tokenizer") as error:
        VERBS[verb](adapter, permuted, tmp_path)
    assert str(base) in str(error.value)
    assert str(permuted) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_same_tokenizer_elsewhere_answers_without_a_word(
    adapter: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = shutil.copytree(base, tmp_path / "moved")
    tokenizer = load_tokenizer(ModelConfig(name=str(base)))
    tokenizer.save_pretrained(moved)
    with caplog.at_level(logging.WARNING):
        there = Predictor.load(find_saved_model(adapter, model=str(moved))).predict(TEXTS)
    assert there == Predictor.load(find_saved_model(adapter)).predict(TEXTS)
    assert not caplog.records


def test_a_run_records_its_own_tokenizer(base: Path, permuted: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, max_steps=1)
    model = replace(config.model, name=str(base), tokenizer=str(permuted))
    run = train(replace(config, model=model), rows=small_rows())
    recorded = read_adapter_config(run.weights)[1].tokenizer
    assert recorded == tokenizer_identity(load_tokenizer(ModelConfig(name=str(permuted))))
    alone = shutil.copytree(run.weights, tmp_path / "copied" / "alone")
    assert Predictor.load(find_saved_model(alone)).predict(TEXTS), "its config.yaml names the tokenizer"
    (alone / "config.yaml").unlink()
    with pytest.raises(AdapterError, match="was trained with the tokenizer"):
        Predictor.load(find_saved_model(alone))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("train", "predict several", "combine")])
def test_an_adapter_that_records_none_says_so_once(
    verb: str, adapter: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = read_adapter(adapter)
    write_adapter(tmp_path / "a", file.config, file.tensors, replace(file.metadata, tokenizer={}))
    with caplog.at_level(logging.WARNING):
        VERBS[verb](tmp_path / "a", base, tmp_path)
    assert sum("records no tokenizer" in record.getMessage() for record in caplog.records) == 1


def test_a_combination_of_unverified_adapters_records_none(adapter: Path, base: Path, tmp_path: Path) -> None:
    file = read_adapter(adapter)
    write_adapter(tmp_path / "a", file.config, file.tensors, replace(file.metadata, tokenizer={}))
    for name, folders, expected in (("both", (adapter, adapter), True), ("one", (adapter, tmp_path / "a"), False)):
        combine_saved([(folder, 0.5) for folder in folders], tmp_path / name, model=str(base))
        assert bool(read_adapter_config(tmp_path / name)[1].tokenizer) == expected
