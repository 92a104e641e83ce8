"""Imports without the garbage collector."""

from __future__ import annotations

import gc
import sys
from types import ModuleType

import pytest

from lora_hf.core import imports
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


@pytest.mark.parametrize(("modules", "frozen"), [(3, True), (2, False)])
def test_objects_are_frozen_only_after_many_modules(
    modules: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "MANY", 2)
    gc.unfreeze()
    with heavy_imports():
        for number in range(modules):
            name = f"imported_{number}"
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert (gc.get_freeze_count() > 0) == frozen
