"""Notebooks run from top to bottom, and the outputs stored in them are current, apart from numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import REPO

pytestmark = pytest.mark.full

nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
pytest.importorskip("nbclient", reason="the extra docs is not installed")

NOTEBOOKS = sorted((REPO / "docs").rglob("*.ipynb"))
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d*)?(?:e[+-]?\d+)?")

# Runs in its own process, because nbclient leaves sockets open until the end, which pytest reports as an error.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def run(notebook: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the notebook in `folder`, and writes it there with its new outputs as `fresh.ipynb`."""
    command = [sys.executable, "-c", RUN, str(notebook), "fresh.ipynb"]
    paths = {"PYTHONPATH": str(REPO), "IPYTHONDIR": str(folder / "ipython")}
    return subprocess.run(command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True)


def code_cells(notebook: Path) -> list[Any]:
    return [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


def output_of(cell: Any) -> str:
    """What the cell prints. Progress bars and loading reports go to standard error, and no cell shows other outputs."""
    assert all(output.output_type == "stream" for output in cell["outputs"])
    return "".join(output.text for output in cell["outputs"] if output.name == "stdout")


def without_numbers(output: str) -> str:
    """Numbers become `#`, because they differ slightly between machines."""
    return " ".join(NUMBER.sub("#", output).split())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_its_stored_outputs_are_current(path: Path, tmp_path: Path) -> None:
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr
    stored, fresh = code_cells(path), code_cells(tmp_path / "fresh.ipynb")
    assert stored
    for old, new in zip(stored, fresh, strict=True):
        output = without_numbers(output_of(new))
        assert without_numbers(output_of(old)) == output, f"run the notebook and store its output:\n{old.source}"
        assert "False" not in output, old.source
    lines = [line for cell in fresh for line in output_of(cell).splitlines()]
    scores = next(line for line in lines if line.startswith("majority "))
    majority, untrained, trained = (float(score) for score in re.findall(r"\d\.\d+", scores))
    assert trained > max(majority, untrained) + 0.15, "the notebook must show a model that has learned"


def test_a_failing_cell_is_detected(tmp_path: Path) -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('one')\n1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    done = run(tmp_path / "broken.ipynb", tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
