"""The Python of docs/serving.md, on adapters that stand where the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.test_pages import REPO, run_page
from tests.served_adapters import save_random


def test_the_serving_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_random(tmp_path / "outputs/a/adapter")
    save_random(tmp_path / "outputs/b/adapter", "rule-restaurants")
    names = run_page(REPO / "docs" / "serving.md")
    assert names["engine"].adapters()[0].name == "e2e"
    answers, text, labels = capsys.readouterr().out.splitlines()
    assert "probabilities" in answers
    assert text
    assert labels.count("tive") == 3
