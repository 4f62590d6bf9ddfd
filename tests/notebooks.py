"""Runs the notebooks from top to bottom in a folder of their own, and keeps what they print and draw.

``python -m tests.notebooks`` (`make notebooks`) writes the outputs into the notebooks of this repository;
tests/test_notebooks.py runs them the same way and compares.
"""

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.runs import REPOSITORY

# In this order: the second trains on the sample set that the first has made.
NAMES = ("M4-data_processing", "M4")
_SECONDS = 600  # of a cell at most


def notebook_path(name: str) -> Path:
    return REPOSITORY / "notebooks" / f"{name}.ipynb"


def run_notebook(name: str, root: Path) -> NotebookNode:
    """A notebook as it stands after running in ROOT/notebooks, with the recipes in ROOT as in the repository.

    What it prints names files from ``root``, wherever that is. Raises nbclient's CellExecutionError where a cell fails.
    """
    folder = root / "notebooks"
    folder.mkdir(exist_ok=True)
    for recipe in REPOSITORY.glob("M4-*.yaml"):
        shutil.copy(recipe, root)
    notebook = nbformat.read(notebook_path(name), as_version=4)
    # The kernel of this interpreter, which knows nothing of the user's own settings.
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",  # threads that wait for each other on a busy machine take ten times as long
        "IPYTHONDIR": str(root / ".ipython"),
        "JUPYTER_CONFIG_DIR": str(root / ".jupyter"),
        "JUPYTER_DATA_DIR": str(root / ".jupyter"),
        "JUPYTER_RUNTIME_DIR": str(root / ".jupyter"),
    }
    client = NotebookClient(
        notebook,
        timeout=_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    with mock.patch.dict(os.environ, environment):
        client.execute()
    return _without_places(notebook, root)


def _without_places(notebook: NotebookNode, root: Path) -> NotebookNode:
    """The notebook without what depends on where and by which Python it ran."""
    places = {f"{path}/" for path in (root, root.resolve())}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for fields in (output, output.get("data", {})):
                for key in {"text", "text/plain"} & fields.keys():
                    for place in places:
                        fields[key] = fields[key].replace(place, "")
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            notebook = run_notebook(name, Path(folder))
            nbformat.write(notebook, notebook_path(name))
            print(f"wrote {notebook_path(name)}")


if __name__ == "__main__":
    main()
