from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.names import base_name, is_hub_id, is_local, is_path


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


@pytest.mark.parametrize("path", ["/x/y/last", "~/last/", "last", "C:\\x\\last", "../last"])
def test_of_a_path_only_its_last_part_may_leave(path: str) -> None:
    assert base_name(path) == "last"
