"""Runs the inputs that the fuzzer has found: each is still rejected, or loaded correctly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_hf.adapters import save_load
from tests.fuzz.__main__ import CORPUS, MAX_BYTES
from tests.fuzz.harness import SEEDS, Harness, seed_inputs

INPUTS = sorted(CORPUS.iterdir())


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.close()


@pytest.mark.parametrize("file", INPUTS, ids=lambda file: file.name)
def test_the_outcome_of_an_input_is_that_in_its_name(file: Path, harness: Harness) -> None:
    data = file.read_bytes()
    assert len(data) <= MAX_BYTES
    assert harness.run(data) == file.name.partition("-")[0]


def test_the_corpus_has_both_outcomes() -> None:
    outcomes = {file.name.partition("-")[0] for file in INPUTS}
    assert outcomes == {"refused", "used"}


@pytest.mark.parametrize("name", SEEDS)
def test_valid_adapters_are_used_and_negative_ranks_refused(name: str, harness: Harness) -> None:
    data = seed_inputs()[name]
    assert harness.run(data) == "used"
    assert harness.run(data.replace(b'"r": ', b'"r": -', 1)) == "refused"


def test_wrongly_loaded_tensors_are_detected(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    original = save_load.from_peft

    def load_doubled(layer: object, name: str, tensors: dict, path: str) -> None:
        original(layer, name, {key: 2 * tensor for key, tensor in tensors.items()}, path)

    monkeypatch.setattr(save_load, "from_peft", load_doubled)
    with pytest.raises(AssertionError, match="differs from the file"):
        harness.run(seed_inputs()["plain"])
