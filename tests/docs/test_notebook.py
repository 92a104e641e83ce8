"""The notebooks run from top to bottom, and show below their cells what the cells put out, numbers aside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import REPO

nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
pytest.importorskip("nbclient", reason="the extra docs is not installed")

NOTEBOOKS = sorted((REPO / "docs").rglob("*.ipynb"))
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d*)?(?:e[+-]?\d+)?")


# In a process of its own: the client leaves sockets to the end of the process, and pytest takes that for an error.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def run(notebook: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs it in `folder`, where it leaves `fresh.ipynb`, which holds what the cells put out now."""
    command = [sys.executable, "-c", RUN, str(notebook), "fresh.ipynb"]
    paths = {"PYTHONPATH": str(REPO), "IPYTHONDIR": str(folder / "ipython")}
    return subprocess.run(command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True)


def said(cell: Any) -> str:
    """The text below a cell, each number as `#`: another machine rounds otherwise."""
    return " ".join(NUMBER.sub("#", put_out(cell)).split())


def put_out(cell: Any) -> str:
    """What stands on standard output; bars and reports of loading are kept out of the notebook."""
    assert all(output.output_type == "stream" for output in cell["outputs"])
    return "".join(output.text for output in cell["outputs"] if output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_shows_what_it_puts_out(path: Path, tmp_path: Path) -> None:
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr
    stored, fresh = nbformat.read(path, 4), nbformat.read(tmp_path / "fresh.ipynb", 4)
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
    nbformat.write(broken, tmp_path / "broken.ipynb")
    done = run(tmp_path / "broken.ipynb", tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
