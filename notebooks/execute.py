"""Executes notebooks and writes them with their outputs: ``python execute.py [NAME.ipynb ...]``, else all of them.

What differs from one execution to the next, or from one machine to the next, is left out, so that a difference in a
notebook is one of its text, its code, or what the library computes.
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
MINUTES = 10  # a cell may take so long
LARGEST = 30_000  # bytes of a picture in all of its colours; a larger one gets 256 of them


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of an execution in its own folder.

    :raises nbclient.exceptions.CellExecutionError: with the cell and its error.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    client = NotebookClient(
        notebook, timeout=60 * MINUTES, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    return quiet(notebook)


def quiet(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook without times, versions and bars of progress, and with small pictures."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data = nbformat.from_dict({"image/png": small(output.data["image/png"])})
                output.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def small(png: str) -> str:
    """A PNG in base 64, without metadata and in fewer colours where it is large."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    if len(file.getvalue()) > LARGEST:
        file = io.BytesIO()
        picture.quantize(256, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
    for path in [Path(name) for name in names] or sorted(HERE.glob("*.ipynb")):
        print(path.name, flush=True)
        nbformat.write(execute(path.resolve()), path)


if __name__ == "__main__":
    main(sys.argv[1:])
