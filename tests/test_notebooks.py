"""The notebooks run from top to bottom; what is committed with them is what they show, without a machine's paths."""

import re
from pathlib import Path

import pytest

pytest.importorskip("ipykernel", reason="needs nbclient, nbformat and ipykernel: pip install -e '.[dev]'")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

from tests.notebooks import NAMES, notebook_path, run_notebook  # noqa: E402
from tests.runs import REPOSITORY  # noqa: E402

# The beginning of an absolute path of a machine.
PLACE = re.compile(r"(?<![\w.~])/(?:tmp|home|root|work|mnt|usr|opt|var|private|Users|builds?)/")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A function: a notebook after running; each runs once, in the order in which they build on each other."""
    root = tmp_path_factory.mktemp("nb")
    return {name: run_notebook(name, root) for name in NAMES}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell shows, by kind: the names of streams, and the types of pictures and values."""
    kinds = set()
    for output in cell.outputs:
        kinds |= {output.name} if output.output_type == "stream" else set(output.data)
    return kinds


@pytest.mark.timeout(900)  # a minute on an idle core
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_shows_what_is_committed(ran, name):
    committed = nbformat.read(notebook_path(name), as_version=4)
    found, expected = ([shown(cell) for cell in code_cells(notebook)] for notebook in (ran[name], committed))
    assert found == expected, "run `make notebooks`, look at the pictures, commit"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_one_run(name):
    notebook = nbformat.read(notebook_path(name), as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "stderr" not in set().union(*map(shown, cells))  # no warnings
    assert sum("image" in kind for cell in cells for kind in shown(cell)) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_no_paths_of_a_machine(name, ran):
    for text in (notebook_path(name).read_text(), nbformat.writes(ran[name])):
        assert PLACE.findall(re.sub(r'"image/\w+": "[^"]*"', "", text)) == []


def test_paths_of_a_machine_are_seen():
    assert PLACE.search(f"wrote {Path('/home/me/runs')}")
    assert not PLACE.search("../runs/notebook https://example.org/home/x data/notebooks")


def test_every_notebook_is_run():
    assert sorted(path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb")) == sorted(NAMES)
