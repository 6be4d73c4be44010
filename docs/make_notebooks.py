"""Execute the notebooks of `examples/notebooks`, and write them with their outputs: `make notebooks`.

Each is a text in jupytext's percent format, beside which the notebook is written that a code host and the site show.
`python docs/make_notebooks.py 2_how_vsa_works` writes that one alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
KEPT = ("kernelspec", "jupytext")
SECONDS = 3600


def read(path: Path, parameters: str = "") -> nbformat.NotebookNode:
    """The notebook of a text; code given as `parameters` follows the cell of that tag."""
    notebook = jupytext.read(path)
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"
    if parameters:
        place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters, id="changed-parameters"))
    return notebook


def write(path: Path) -> None:
    """Execute a text and write its notebook beside it."""
    notebook = read(path)
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    notebook.metadata = {name: value for name, value in notebook.metadata.items() if name in KEPT}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    target = path.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for text in sorted(NOTEBOOKS.glob("*.py")):
        if text.stem in sys.argv[1:] or len(sys.argv) == 1:
            write(text)
