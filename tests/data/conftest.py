"""A small synthetic data set and its prepared tokens, made once."""

import csv
from pathlib import Path

import pytest

from m4.data.preparation.prepare import prepare
from m4.data.synthetic.clips import SynthOptions
from m4.data.synthetic.synth import synthesize
from tests.runs import write_tokens

# Modalities, vocabularies and lengths for open_store.
STORE = (["tok_rgb", "coords"], [65_536, 65_536], [256, 39])
SMALL = SynthOptions(videos=5, seed=3, frames=(8, 10), size=(120, 161), scenes=3, fps=8.0, noise=3.0)


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Five videos in the Penn Action layout. Read only: copy before changing anything."""
    out = tmp_path_factory.mktemp("videos") / "penn"
    synthesize(out, SMALL, progress=False)
    return out


@pytest.fixture(scope="session")
def prepared(videos, tmp_path_factory) -> Path:
    """Tokens of ``videos``. Read only."""
    out = tmp_path_factory.mktemp("prepared") / "root"
    prepare(videos, out, progress=False)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two splits of random tokens in folders. Read only."""
    root = tmp_path_factory.mktemp("folders") / "root"
    write_tokens(root, "train", 23, seed=1)
    write_tokens(root, "eval", 7, seed=2)
    return root


@pytest.fixture(scope="session")
def tree():
    """A function: the content of every file below a folder that is not hidden, by relative path."""

    def read(root: Path) -> dict[str, bytes]:
        files = (path for path in root.rglob("*") if path.is_file())
        shown = (path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts))
        return {str(path.relative_to(root)): path.read_bytes() for path in shown}

    return read


def table(root):
    """The rows of pairs.csv."""
    with open(root / "pairs.csv", newline="") as file:
        return list(csv.DictReader(file))
