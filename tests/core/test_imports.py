"""Imports without the garbage collector."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from lora_hf.core.imports import heavy_imports


def test_nothing_is_collected_within_and_everything_is_afterwards() -> None:
    with heavy_imports():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_import_that_fails_leaves_the_collector_running() -> None:
    with pytest.raises(ImportError), heavy_imports():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with heavy_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(("before", "frozen"), [(False, True), (True, False)])
def test_objects_are_frozen_only_when_torch_is_first_imported(
    before: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not before:
        monkeypatch.delitem(sys.modules, "torch")
    gc.unfreeze()
    with heavy_imports():
        monkeypatch.setitem(sys.modules, "torch", torch)
    assert (gc.get_freeze_count() > 0) == frozen
