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
from collections.abc import Iterator
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
MOST_BYTES = 2_000_000
TIMEOUT = 600  # seconds a cell


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run every cell in a fresh kernel started in docs/, as Jupyter does; an error in a cell is an error here."""
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return NotebookClient(notebook, timeout=TIMEOUT, resources=where, record_timing=False).execute()


def outputs(notebook: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode]:
    """The outputs of all cells, one after the other."""
    for cell in code_cells(notebook):
        yield from cell.outputs


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that are run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: nbformat.NotebookNode) -> list[Image.Image]:
    """The pictures, decoded."""
    found = [output.data["image/jpeg"] for output in outputs(notebook) if "image/jpeg" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def metrics(notebook: nbformat.NotebookNode) -> pd.DataFrame:
    """The table of figures, a row a scan."""
    texts = [output.data["text/plain"] for output in outputs(notebook) if "text/html" in output.get("data", {})]
    (table,) = (text for text in texts if "psnr_brain" in text)
    return pd.read_csv(io.StringIO(table), sep=r"\s+")


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    """The notebook as it lies in docs/."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    """A run of it on the CPU; what Jupyter itself keeps stays out of the user's home."""
    folder = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(variable, str(folder / variable.lower()))
        return execute(nbformat.read(NOTEBOOK, as_version=4))


@pytest.mark.slow
def test_runs_from_top_to_bottom(executed: nbformat.NotebookNode) -> None:
    """No cell ends in an error, and none is left out."""
    assert [cell.execution_count for cell in code_cells(executed)] == list(range(1, len(code_cells(executed)) + 1))
    assert not [output for output in outputs(executed) if output.output_type == "error"]


@pytest.mark.slow
def test_shows_every_picture(executed: nbformat.NotebookNode) -> None:
    """As many as its text speaks of, and none of them is blank."""
    assert len(pictures(executed)) == N_PICTURES
    assert all(picture.convert("L").getextrema()[1] > 200 for picture in pictures(executed))


@pytest.mark.slow
def test_gives_figures_of_every_scan(executed: nbformat.NotebookNode) -> None:
    """All are finite and within their range."""
    table = metrics(executed)
    assert len(table) == 3 and list(table.columns) == ["l1", "psnr", "psnr_brain", "ssim", "kl"]
    assert all(math.isfinite(value) and value > 0 for value in table.to_numpy().ravel())
    assert (table["ssim"] <= 1).all() and (table["psnr_brain"] < table["psnr"]).all()


@pytest.mark.parametrize("folder", [".", "docs", "docs/images"])
def test_finds_the_bundle(committed: nbformat.NotebookNode, folder: str) -> None:
    """Wherever within the bundle it is started."""
    done = start(committed, ROOT / folder)
    assert done.stdout.strip() == str(ROOT), done.stderr


def test_says_where_to_start_it(committed: nbformat.NotebookNode, tmp_path: Path) -> None:
    """Outside of the bundle it ends at once, with the remedy."""
    done = start(committed, tmp_path)
    assert done.returncode == 1 and "Start the notebook in the bundle's folder" in done.stderr


def start(notebook: nbformat.NotebookNode, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the cell that goes to the bundle's folder, and print where it has gone."""
    (source,) = (cell.source for cell in code_cells(notebook) if "os.chdir" in cell.source)
    command = [sys.executable, "-c", f"{source}\nprint(os.getcwd())"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_links_lead_to_files(committed: nbformat.NotebookNode) -> None:
    """Beside the notebook in docs/."""
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_committed_run_is_in_order(committed: nbformat.NotebookNode) -> None:
    """Executed once, from the first cell to the last, without errors or warnings."""
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    assert not [o for o in outputs(committed) if o.output_type == "error" or o.get("name") == "stderr"]
    assert len(pictures(committed)) == N_PICTURES


def test_committed_file_is_small() -> None:
    """A repository keeps every version of it."""
    assert NOTEBOOK.stat().st_size < MOST_BYTES


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


def test_committed_run_is_of_the_shipped_weights(committed: nbformat.NotebookNode) -> None:
    """New weights need a new run: see this file's head."""
    printed = "".join(output.text for output in outputs(committed) if output.output_type == "stream")
    assert f"weights sha256 {file_sha256(ROOT / 'models' / 'model.pt')[:12]}" in printed


def write_anew(path: Path) -> None:
    """Execute the notebook in place, leaving out what changes from machine to machine."""
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, where Jupyter's widgets are not installed
    notebook = execute(nbformat.read(path, as_version=4))
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    write_anew(NOTEBOOK)
