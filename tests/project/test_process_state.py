"""Commands run in the process of the tests, so nothing that one changes may reach the next."""

from __future__ import annotations

import logging
import os
import random
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from lora_hf.lora import active_adapter
from lora_hf.lora.active_adapter import AdapterState
from tests.support.command_lines import ask
from tests.support.process_state import restored_process_state

FOUND: dict[str, Any] = {}


def state() -> dict[str, Any]:
    loggers = {name: logging.getLogger(name) for name in (None, "lora_hf", "transformers")}
    return {
        "logging": {name: (logger.level, logger.handlers[:]) for name, logger in loggers.items()},
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "draws": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "adapters": dict(active_adapter._overrides.get()),
        "warnings": warnings.filters[:],
    }


def change_everything(folder: Path) -> None:
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("lora_hf").setLevel(logging.CRITICAL)
    os.environ["A_NEW_VARIABLE"] = "1"
    os.environ["PATH"] = "elsewhere"
    del os.environ["HF_HOME"]
    os.chdir(folder)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    active_adapter._overrides.set(MappingProxyType({AdapterState(): "another"}))


def test_whatever_a_test_changes_is_restored(tmp_path: Path) -> None:
    before = state()
    with restored_process_state():
        change_everything(tmp_path)
        changed = state()
    assert [key for key in before if key != "warnings" and before[key] == changed[key]] == []
    assert state() == before


@pytest.mark.parametrize("number", range(2))
def test_a_test_may_change_everything(number: int, tmp_path: Path) -> None:
    """The second call finds what the first one found."""
    found = state() | {"environment": {**os.environ, "PYTEST_CURRENT_TEST": ""}}
    if number == 0:
        FOUND.update(found)
    assert found == FOUND
    ask("info")
    change_everything(tmp_path)
    warnings.simplefilter("ignore")
