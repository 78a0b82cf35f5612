"""Run the notebook in a temporary folder and keep its outputs: `nox -s notebook`.

What is kept is small and the same for everybody: printed text and pictures, no warnings, no times, no folders.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "notebooks" / "sandbox.ipynb"
KEPT = {"text/plain", "image/png"}


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Execute the cells of a notebook in a folder; a cell that fails raises what it raised, as text.

    Args:
        path: The notebook, which is only read.
        folder: Where its kernel works.

    Returns:
        The notebook with its new outputs.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "data" in output:
                    output.data = {kind: value for kind, value in output.data.items() if kind in KEPT}
    notebook.metadata.language_info = {"name": "python"}
    return notebook


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        nbformat.write(run(NOTEBOOK, Path(folder)), sys.argv[1] if sys.argv[1:] else NOTEBOOK)
