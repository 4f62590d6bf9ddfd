"""Packing and opening the data sets of tests, and what it is for two to be the same."""

import shutil

import numpy as np

from m4.data.layout import find_splits
from m4.data.packed.packing import pack
from m4.data.store import open_store
from tests.runs import MODALITIES

NAMES, LENGTHS = list(MODALITIES), list(MODALITIES.values())


def open_it(root, split="train", names=NAMES, lengths=LENGTHS, vocab=64, **more):
    return open_store(root, split, names, [vocab] * len(names), lengths, **more)


def pack_it(*roots, out, **more):
    return pack(roots, out, progress=False, **more)


def assert_same(packed, folders, **more):
    """Every split has the rows, names, order and fingerprint that it has in folders."""
    assert find_splits(packed) == find_splits(folders)
    for split in find_splits(folders):
        ours, theirs = open_it(packed, split, **more), open_it(folders, split, **more)
        assert ours.fingerprint == theirs.fingerprint
        assert tuple(ours.pids) == tuple(theirs.pids)
        np.testing.assert_array_equal(np.asarray(ours.tokens), theirs.tokens)
        np.testing.assert_array_equal(ours.batch([3, 0, 3]), theirs.batch([3, 0, 3]))


def halves(folders, tmp_path):
    """The samples of ``folders`` in two roots: every third in the second."""
    for part in ("one", "two"):
        shutil.copytree(folders, tmp_path / part)
        shutil.rmtree(tmp_path / part / ".cache", ignore_errors=True)
        for path in list((tmp_path / part).glob("*/*/*")):
            if (int(path.name) % 3 == 0) == (part == "one"):
                shutil.rmtree(path)
    return tmp_path / "one", tmp_path / "two"
