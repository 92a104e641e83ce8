"""What every test of a task gets: data from where it says, and from nowhere else."""

from __future__ import annotations

import pytest

from lora_hf.data.tasks.sources import DATA_DIR_VARIABLE


@pytest.fixture(autouse=True)
def _no_data_dir_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
