"""What the fuzzer has found so far, again: each input is refused in one message, or loaded as it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.__main__ import CORPUS, LONGEST
from tests.fuzz.harness import FIRST, Harness, first_inputs

INPUTS = sorted(CORPUS.iterdir())


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.close()


@pytest.mark.parametrize("file", INPUTS, ids=lambda file: file.name)
def test_an_input_ends_as_its_name_says(file: object, harness: Harness) -> None:
    data = file.read_bytes()  # type: ignore[attr-defined]
    assert len(data) <= LONGEST
    assert harness.attempt(data) == file.name.partition("-")[0]  # type: ignore[attr-defined]


def test_the_corpus_holds_both_ends() -> None:
    ends = {file.name.partition("-")[0] for file in INPUTS}
    assert ends == {"refused", "used"}


@pytest.mark.parametrize("name", FIRST)
def test_a_good_adapter_of_each_form_is_used(name: str, harness: Harness) -> None:
    data = first_inputs()[name]
    assert harness.attempt(data) == "used"
    assert harness.attempt(data.replace(b'"r": ', b'"r": -', 1)) == "refused"


def test_a_load_that_is_not_what_the_file_holds_is_found(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_hf.adapters import save_load

    def wrong(layer: object, name: str, tensors: dict, path: str) -> None:
        loaded(layer, name, {key: 2 * tensor for key, tensor in tensors.items()}, path)

    loaded = save_load.from_peft
    monkeypatch.setattr(save_load, "from_peft", wrong)
    with pytest.raises(AssertionError, match="is not what the file holds"):
        harness.attempt(first_inputs()["plain"])
