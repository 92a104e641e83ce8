from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.errors import ModelError
from lora_hf.models.model_ids import (
    BUNDLED,
    HUB_IDS,
    base_name,
    check_model_exists,
    is_hub_id,
    is_local,
    is_path,
    suggest_model,
)


@pytest.mark.parametrize(
    ("name", "path", "hub_id"),
    [
        ("someone/a-lora", False, True),
        ("someone/a.b_c-1", False, True),
        ("roberta-base", False, False),
        ("./someone/a", True, False),
        ("/someone/a", True, False),
        ("~/a", True, False),
        ("a/b/c", True, False),
        ("..", True, False),
        ("a\\b", True, False),
        ("someone/", False, False),
    ],
)
def test_a_path_and_a_hub_id_are_told_apart(name: str, path: bool, hub_id: bool) -> None:
    assert (is_path(name), is_hub_id(name)) == (path, hub_id)


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("someone/a")
    (tmp_path / "someone" / "a").mkdir(parents=True)
    assert is_local("someone/a")
    assert not is_hub_id("someone/a")
    assert not is_local(""), "no name is no folder"


@pytest.mark.parametrize("path", ["/x/y/last", "~/last/", "last", "C:\\x\\last", "../last"])
def test_of_a_path_only_its_last_part_may_leave(path: str) -> None:
    assert base_name(path) == "last"


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-robrta", "tinyroberta", "tiny-gpt", "tiny_gpt2", "./tiny-gpt2"])
def test_a_base_that_is_nowhere_is_told_before_the_hub_is_asked(name: str) -> None:
    with pytest.raises(ModelError, match="no such"):
        check_model_exists(name)


# The hub's oldest models, whose names have no `/`, and what is near ours under another user.
HUBS = [*BUNDLED, *HUB_IDS, *HUB_IDS.values(), "distilgpt2", "gpt2-xl", "openai-gpt", "bert-base-cased", "t5-small"]
HUBS += [
    "distilroberta-base",
    "xlm-roberta-base",
    "roberta-base-openai-detector",
    "albert-base-v2",
    "someone/tiny-bert",
]


@pytest.mark.parametrize("name", HUBS)
def test_a_name_that_the_hub_may_hold_is_left_to_it(name: str) -> None:
    check_model_exists(name)


def test_a_name_that_failed_is_told_with_the_nearest_known() -> None:
    assert suggest_model("roberta-bas") == " (did you mean 'roberta-base'?)"
    assert (suggest_model("roberta-base"), suggest_model("someone/roberta-bas")) == ("", "")
