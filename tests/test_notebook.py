"""The notebook of docs/ runs from top to bottom, and what is committed is a clean run of it with the shipped weights.

After a change of the notebook or of the weights this executes it and writes its outputs anew:

    PYTHONPATH=. python tests/test_notebook.py
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image

from scripts.run import file_sha256

NOTEBOOK = ROOT / "docs" / "visualize_recon.ipynb"
N_PICTURES = 6  # a reconstruction of each of three scans, the latent, the way between two subjects, samples


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run every cell in a fresh kernel started in docs/, as Jupyter does; an error in a cell is an error here."""
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return NotebookClient(notebook, timeout=600, resources=where, record_timing=False).execute()


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that are run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The outputs of all cells, one after the other."""
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def assert_in_order(notebook: nbformat.NotebookNode) -> None:
    """Executed once, from the first cell to the last, without an error, and as many pictures as its text speaks of."""
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    found = [output.data["image/jpeg"] for output in outputs(notebook) if "image/jpeg" in output.get("data", {})]
    pictures = [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]
    assert len(pictures) == N_PICTURES
    assert all(picture.convert("L").getextrema()[1] > 200 for picture in pictures), "one is blank"


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    """The notebook as it lies in docs/."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with the figures of every scan; what Jupyter itself keeps stays out of the user's home."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    executed = execute(nbformat.read(NOTEBOOK, as_version=4))
    assert_in_order(executed)
    texts = [output.data["text/plain"] for output in outputs(executed) if "text/html" in output.get("data", {})]
    (text,) = (text for text in texts if "psnr_brain" in text)
    table = pd.read_csv(io.StringIO(text), sep=r"\s+")
    assert len(table) == 3 and list(table.columns) == ["l1", "psnr", "psnr_brain", "ssim", "kl"]
    assert all(math.isfinite(value) and value > 0 for value in table.to_numpy().ravel())
    assert (table["ssim"] <= 1).all() and (table["psnr_brain"] < table["psnr"]).all()


def test_finds_the_bundle_or_says_where_to_start(committed: nbformat.NotebookNode, tmp_path: Path) -> None:
    """Wherever within the bundle it is started; outside of it, it ends at once, with the remedy."""
    (source,) = (cell.source for cell in code_cells(committed) if "os.chdir" in cell.source)
    command = [sys.executable, "-c", f"{source}\nprint(os.getcwd())"]
    inside, below, outside = (
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        for folder in (ROOT, ROOT / "docs" / "images", tmp_path)
    )
    assert inside.stdout.strip() == below.stdout.strip() == str(ROOT), below.stderr
    assert outside.returncode == 1 and "Start the notebook in the bundle's folder" in outside.stderr


def test_committed_run_is_in_order_and_of_the_shipped_weights(committed: nbformat.NotebookNode) -> None:
    """Without warnings, too. New weights need a new run: see this file's head."""
    assert_in_order(committed)
    assert not [output for output in outputs(committed) if output.get("name") == "stderr"]
    printed = "".join(output.text for output in outputs(committed) if output.output_type == "stream")
    assert f"weights sha256 {file_sha256(ROOT / 'models' / 'model.pt')[:12]}" in printed


def test_committed_file_says_nothing_of_a_machine(committed: nbformat.NotebookNode) -> None:
    """No absolute path, no time of execution, no version of the Python that ran it."""
    nbformat.validate(committed)
    shown = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in shown["cells"]:
        assert not cell["metadata"]
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # base64 has slashes, too
    assert not re.findall(r"/(?:work|root|home|tmp|Users|mnt)\b|[A-Z]:\\\\", json.dumps(shown))
    assert shown["metadata"]["kernelspec"]["name"] == "python3"
    assert shown["metadata"]["language_info"] == {"name": "python"}


if __name__ == "__main__":  # in place, leaving out what changes from machine to machine
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, where Jupyter's widgets are not installed
    anew = execute(nbformat.read(NOTEBOOK, as_version=4))
    anew.metadata.language_info = {"name": "python"}
    nbformat.write(anew, NOTEBOOK)
