"""The notebooks run from top to bottom, and show below their cells what the cells put out, numbers aside."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from tests.pages import REPO

nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra docs is not installed")
manager = pytest.importorskip("jupyter_client.manager", reason="the extra docs is not installed")

NOTEBOOKS = sorted((REPO / "docs").rglob("*.ipynb"))
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d*)?(?:e[+-]?\d+)?")


def run(notebook: Any, folder: Path) -> Any:
    """A copy of the notebook with what its cells put out."""
    fresh = copy.deepcopy(notebook)
    kernel = manager.AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(folder / "kernel"))
    nbclient.NotebookClient(fresh, km=kernel, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return fresh


def said(cell: Any) -> str:
    """The text below a cell, each number as `#`: another machine rounds otherwise."""
    return " ".join(NUMBER.sub("#", put_out(cell)).split())


def put_out(cell: Any) -> str:
    """What stands on standard output; bars and reports of loading are kept out of the notebook."""
    assert all(output.output_type == "stream" for output in cell["outputs"])
    return "".join(output.text for output in cell["outputs"] if output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_shows_what_it_puts_out(path: Path, tmp_path: Path) -> None:
    stored = nbformat.read(path, 4)
    fresh = run(stored, tmp_path)
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    again = [cell for cell in fresh.cells if cell.cell_type == "code"]
    assert cells
    for cell, ran in zip(cells, again, strict=True):
        assert said(cell) == said(ran), f"store what it puts out now, below:\n{cell.source}"
        assert "False" not in said(ran), cell.source
    majority, untrained, trained = (float(word) for word in re.findall(r"\d\.\d+", scores_of(again)))
    assert trained > max(majority, untrained) + 0.15, "what the notebook shows must have learned"


def scores_of(cells: list[Any]) -> str:
    """The line with the three scores."""
    lines = (line for cell in cells for line in put_out(cell).splitlines())
    return next(line for line in lines if line.startswith("always one answer"))


def test_a_cell_that_fails_is_seen(tmp_path: Path) -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('one')\n1 / 0")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        run(broken, tmp_path)
