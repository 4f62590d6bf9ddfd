"""Packed data sets: the same rows, order and fingerprints as in folders, whatever was added or divided."""

import json
import shutil
import time

import numpy as np
import pytest

from m4.data.__main__ import main
from m4.data.layout import find_splits, read_meta
from m4.data.packed import packing
from m4.data.packed.index import INDEX, SHARDS, read_index
from m4.data.packed.rows import ShardRows, SplitTokens
from m4.data.packed.samples import Samples
from m4.data.packed.sources import Block
from m4.data.packed.splits import split_packed
from m4.data.packed.unpacking import unpack
from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.prepare import merge, prepare
from m4.data.split import split_output_dataset
from m4.data.store import open_store
from m4.errors import DataError
from tests.data.conftest import STORE
from tests.data.packed_sets import LENGTHS, NAMES, assert_same, halves, open_it, pack_it
from tests.runs import write_tokens


@pytest.mark.parametrize("shard_rows", [1, 4, 100])
def test_the_same_as_in_folders(folders, tmp_path, shard_rows):
    result = pack_it(folders, out=tmp_path / "p", shard_rows=shard_rows)
    assert (result.splits, result.added, result.present) == ({"train": 23, "eval": 7}, 30, 0)
    assert_same(tmp_path / "p", folders)
    assert isinstance(open_it(tmp_path / "p").tokens, np.memmap) == (shard_rows == 100)
    # Other choices of modalities: some, and in another order.
    assert_same(tmp_path / "p", folders, names=["coords"], lengths=[6])
    assert_same(tmp_path / "p", folders, names=NAMES[::-1], lengths=LENGTHS[::-1])
    assert_same(tmp_path / "p", folders, names=NAMES[1:3], lengths=LENGTHS[1:3])
    files = [path for path in (tmp_path / "p").rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert len(files) == len(read_index(tmp_path / "p").files()) + 2  # the index, the lock


def test_real_data_with_captions_and_pairs(prepared, tmp_path, tree):
    """Nothing is lost on the way there and back, to the byte."""
    pack_it(prepared, out=tmp_path / "p", shard_rows=5)
    names, vocab, lengths = STORE
    for split in find_splits(prepared):
        ours, theirs = (open_store(root, split, names, vocab, lengths) for root in (tmp_path / "p", prepared))
        assert ours.fingerprint == theirs.fingerprint
    assert read_meta(tmp_path / "p") == read_meta(prepared)
    unpack(tmp_path / "p", tmp_path / "back", progress=False)
    assert tree(tmp_path / "back") == tree(prepared)
    index = read_index(tmp_path / "p")
    assert [(c.name, c.vocab_size) for c in index.columns][:2] == [("tok_rgb", 64_000), ("coords", 8192)]


def prepare_both(videos, tmp_path, **options):
    for name, packed in (("p", True), ("root", False)):
        prepare(videos, tmp_path / name, PrepareOptions(**options), progress=False, packed=packed)
    return tmp_path / "p", tmp_path / "root"


def same_as_prepared(packed, folders):
    names, vocab, lengths = STORE
    assert find_splits(packed) == find_splits(folders)
    for split in find_splits(folders):
        ours, theirs = (open_store(root, split, names, vocab, lengths) for root in (packed, folders))
        assert ours.fingerprint == theirs.fingerprint
    without = read_meta(folders)
    del without["content"]  # of files that are not there
    assert read_meta(packed) == without


def test_prepared_without_folders(videos, tmp_path, tree):
    """prepare --packed gives the samples of prepare, whatever the split; again it changes nothing."""
    packed, folders = prepare_both(videos, tmp_path)
    same_as_prepared(packed, folders)
    assert not [path for path in packed.iterdir() if path.is_dir() and path.name not in (SHARDS, ".cache", ".videos")]
    before = tree(packed)
    assert not prepare(videos, packed, progress=False, packed=True).fresh
    assert tree(packed) == before
    unpack(packed, tmp_path / "back", progress=False)
    back, made = tree(tmp_path / "back"), tree(folders)
    del back["meta.json"], made["meta.json"]
    assert back == made
    for root in (packed, folders):
        merge(root, (0.4, 0.3, 0.3), seed=7, unit="pair")
    same_as_prepared(packed, folders)
    with pytest.raises(DataError, match="expected packed False, found data made with packed True"):
        prepare(videos, packed, progress=False)


def test_prepared_anew_when_a_video_changes(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "penn")
    packed, folders = prepare_both(tmp_path / "penn", tmp_path, captions="none", split_unit="pair")
    same_as_prepared(packed, folders)
    shutil.copy(videos / "labels/0001.mat", tmp_path / "penn/labels/0002.mat")
    shutil.rmtree(tmp_path / "penn/frames/0002")
    shutil.copytree(videos / "frames/0001", tmp_path / "penn/frames/0002")
    prepare_both(tmp_path / "penn", tmp_path, captions="none", split_unit="pair")
    same_as_prepared(packed, folders)


def test_indexing_as_an_array(tmp_path):
    """Every way in which the rows of several shards are read gives what one array gives."""
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 65_536, (57, 10)).astype(np.uint16)
    files = []
    for number, part in enumerate(np.split(whole, [3, 20, 21, 50])):
        (tmp_path / f"{number}").write_bytes(part.astype("<u2").tobytes())
        files.append((tmp_path / f"{number}", len(part)))
    scattered = rng.permutation(57)[:40]
    for rows, columns in (
        (range(57), slice(None)),
        (range(5, 49), slice(2, 7)),
        (scattered, np.array([7, 1, 2])),
        (range(2, 3), slice(None)),
    ):
        shards = ShardRows(files, 10)
        shards._most_open = 2  # files are closed and opened again
        tokens, expected = SplitTokens(shards, rows, columns), whole[np.array(rows)][:, columns]
        assert (tokens.shape, len(tokens), tokens.nbytes) == (expected.shape, len(expected), expected.nbytes)
        np.testing.assert_array_equal(np.array(tokens), expected)
        for key in (
            0, -1, slice(None), slice(0, 0), slice(3, 30), slice(None, None, 7), slice(30, 3), slice(-9, None),
            np.array([], int), [0, 0], rng.integers(-len(expected), len(expected), (4, 5)),
            rng.random(len(expected)) < 0.5, (slice(None), slice(1, 3)), (slice(2, 9), 0), (np.array([0]), 1),
            ([0, 0, -1], slice(None, None, 2)),
        ):  # fmt: skip
            found = tokens[key]
            np.testing.assert_array_equal(found, expected[key], err_msg=repr(key))
            assert (found.dtype, found.shape) == (np.dtype(np.uint16), expected[key].shape)
        for beyond in (len(expected), -len(expected) - 1):
            with pytest.raises(IndexError):
                tokens[[0, beyond]]


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_added_lies_as_if_it_had_been_there(folders, tmp_path, merge):
    """In folders and packed, one after the other: names decide the order, so the fingerprint is that of the union."""
    one, two = halves(folders, tmp_path)
    pack_it(two, out=tmp_path / "p", shard_rows=4)
    before = open_it(tmp_path / "p")
    rows = np.array(before.tokens)
    if merge:
        pack_it(one, out=tmp_path / "other", shard_rows=3)
        one = tmp_path / "other"
    result = pack_it(one, out=tmp_path / "p", shard_rows=4)
    assert result.added == len(folders_names(folders)) - 11
    assert_same(tmp_path / "p", folders)
    np.testing.assert_array_equal(before.tokens, rows)  # an open store keeps its data
    again = pack_it(one, two, folders, out=tmp_path / "p")
    assert (again.added, again.present) == (0, 60)
    assert_same(tmp_path / "p", folders)


def folders_names(root):
    return [path for path in root.glob("*/coords/*")]


def test_samples_of_one_name(folders, tmp_path):
    write_tokens(tmp_path / "other", "train", 2, seed=9)
    pack_it(folders, out=tmp_path / "p")
    before = (tmp_path / "p" / INDEX).read_bytes()
    with pytest.raises(DataError, match=r"other \(train/000000\): .*with other tokens. Tell the .* --prefix"):
        pack_it(tmp_path / "other", out=tmp_path / "p")
    assert (tmp_path / "p" / INDEX).read_bytes() == before
    assert_same(tmp_path / "p", folders)
    assert pack_it(tmp_path / "other", out=tmp_path / "p", prefix="b-").splits == {"train": 25, "eval": 7}
    store = open_it(tmp_path / "p")
    assert list(store.pids)[-2:] == ["b-000000", "b-000001"]
    np.testing.assert_array_equal(store.tokens[-2:], open_it(tmp_path / "other").tokens)


def test_dividing_anew(prepared, tmp_path):
    """The same samples in each split as in folders, for both units; no shard is written."""
    shutil.copytree(prepared, tmp_path / "root")
    pack_it(prepared, out=tmp_path / "p", shard_rows=4)
    shards = {path.name for path in (tmp_path / "p" / SHARDS).glob("*.u16")}
    names, vocab, lengths = STORE
    for fractions, seed, unit in (
        ((0.5, 0.25, 0.25), 3, "pair"),
        ((0.4, 0.3, 0.3), 1, "video"),
        ((1, 0, 0), 0, "pair"),
    ):
        assert split_packed(tmp_path / "p", fractions, seed, unit) == split_output_dataset(
            tmp_path / "root", fractions, seed, unit
        )
        for split in find_splits(tmp_path / "p"):
            ours, theirs = (
                open_store(root, split, names, vocab, lengths) for root in (tmp_path / "p", tmp_path / "root")
            )
            assert ours.fingerprint == theirs.fingerprint
            assert tuple(ours.pids) == tuple(theirs.pids)
        assert read_meta(tmp_path / "p") == read_meta(tmp_path / "root")
    assert {path.name for path in (tmp_path / "p" / SHARDS).glob("*.u16")} == shards


def test_dividing_needs_videos_and_names_that_differ(folders, tmp_path):
    pack_it(folders, out=tmp_path / "p")
    with pytest.raises(DataError, match="each sample once, found two of the name 000000"):
        split_packed(tmp_path / "p")
    write_tokens(tmp_path / "one", "train", 3, seed=9)
    pack_it(tmp_path / "one", out=tmp_path / "q")
    with pytest.raises(DataError, match="the video of every sample, found none for 000000"):
        split_packed(tmp_path / "q")


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_commands(prepared, videos, tmp_path, capsys):
    root, other = tmp_path / "p", tmp_path / "both"
    assert run(capsys, "pack", prepared, "--out", root, "--shard-rows", 3)[0] == 0
    _, folders, _ = run(
        capsys, "inspect", prepared, "--sheet", tmp_path / "one.png", "--samples", 3, "--penn-action", videos
    )
    status, out, _ = run(
        capsys, "inspect", root, "--sheet", tmp_path / "two.png", "--samples", 3, "--penn-action", videos
    )
    assert status == 0
    ours, theirs = ([line for line in text.splitlines() if "content" not in line][1:-1] for text in (out, folders))
    assert ours == theirs
    assert len(ours) > 20
    assert "packed; the digests of all files are those of its index" in out
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    status, out, _ = run(
        capsys, "pack", root, prepared, "--out", other, "--modality", "coords", "--modality", "tok_rgb:256"
    )
    assert status == 0
    samples = sum(rows.rows for rows in read_index(root).splits.values())
    assert f"{samples} samples packed into {other} ({samples} were there already): train " in out
    status, out, _ = run(capsys, "split", root, "--fractions", 1, 0, 0, "--unit", "pair")
    assert (status, out) == (0, f"train {samples}, eval 0, test 0\n")
    status, out, _ = run(capsys, "unpack", root, "--out", tmp_path / "back")
    assert (status, out) == (0, f"samples in {tmp_path / 'back'}: train {samples}\n")
    status, out, _ = run(capsys, "prepare", "--penn-action", videos, "--out", tmp_path / "direct", "--packed")
    assert status == 0
    assert f"{samples} pairs of 5 videos in {tmp_path / 'direct'}: train" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pack", "nowhere", "--out", "p"], "nowhere: expected a data root"),
        (["pack", "--out", "p"], "ROOT"),
        (
            ["pack", "x", "--out", "p", "--modality", "a:b"],
            "--modality: expected NAME or NAME:TOKENS such as depth:256",
        ),
        (["pack", "x", "--out", "p", "--modality", "a", "--modality", "a"], "--modality: expected different names"),
        (["pack", "x", "--out", "p", "--shard-rows", "0"], "--shard-rows: expected at least 1"),
        (["unpack", "nowhere", "--out", "p"], "nowhere: expected a packed data set"),
    ],
)
def test_mistakes(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit(folders, tmp_path):
    root = tmp_path / "p"
    pack_it(folders, out=root)
    with pytest.raises(DataError, match=r"packed.json: expected samples of the split test, found only train, eval"):
        open_it(root, "test")
    with pytest.raises(DataError, match=r"packed.json: expected the modality depth, found only tok_rgb, coords"):
        open_it(root, names=["depth"], lengths=[3])
    with pytest.raises(DataError, match=r"packed.json: expected 7 tokens of coords a sample"):
        open_it(root, names=["coords"], lengths=[7])
    largest = int(open_it(folders).tokens.max())
    with pytest.raises(
        DataError, match=rf"\.u16, row \d+ \(train/.*/0000..\): expected tokens below {largest} .vocab_sizes"
    ):
        open_it(root, vocab=largest)
    with pytest.raises(DataError, match=r"sources: expected a data root|nowhere: expected a data root"):
        pack_it(tmp_path / "nowhere", out=tmp_path / "q")
    assert not (tmp_path / "q").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(DataError, match=r"full: expected an empty folder, or a packed .* found notes.txt"):
        pack_it(folders, out=tmp_path / "full")
    with pytest.raises(DataError, match="expected an output folder outside of the input"):
        pack_it(folders, out=folders / "p")
    with pytest.raises(
        DataError, match=r"expected the modalities of .*tok_rgb of 12, .*found coords of 6. Choose them"
    ):
        pack_it(folders, out=root, modalities={"coords": None})
    with pytest.raises(DataError, match=r"expected 5 tokens of coords, found shape \(6,\). Say how many"):
        pack_it(folders, out=tmp_path / "q", modalities={"coords": 5})
    with pytest.raises(DataError, match=r"prefix: expected text without /"):
        pack_it(folders, out=tmp_path / "q", prefix="a/b")


def test_some_modalities_in_an_order(folders, tmp_path):
    pack_it(folders, out=tmp_path / "p", modalities={"coords": None, "tok_rgb": 12})
    assert_same(tmp_path / "p", folders, names=["coords", "tok_rgb"], lengths=[6, 12])
    pack_it(tmp_path / "p", out=tmp_path / "q", modalities={"tok_rgb": None})
    assert_same(tmp_path / "q", folders, names=["tok_rgb"], lengths=[12])
    with pytest.raises(DataError, match="expected the modality depth, found coords of 6, tok_rgb of 12"):
        pack_it(tmp_path / "p", out=tmp_path / "r", modalities={"depth": None})


def test_other_tokenizers_are_not_mixed(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "root")
    pack_it(prepared, out=tmp_path / "p")
    meta = json.loads((tmp_path / "root/meta.json").read_text())
    meta["tokenizer"]["id"] = "cosmos"
    (tmp_path / "root/meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="expected data made with the image tokenizer of"):
        pack_it(tmp_path / "root", out=tmp_path / "p", prefix="b")


def test_unpacking_elsewhere_or_again(folders, tmp_path, tree, monkeypatch):
    pack_it(folders, out=tmp_path / "p", shard_rows=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(DataError, match="full: expected an empty folder"):
        unpack(tmp_path / "p", tmp_path / "full", progress=False)
    with monkeypatch.context() as patch:  # cut off
        patch.setattr("m4.data.packed.unpacking.write_atomically", lambda *_: None)
        patch.setattr("m4.data.packed.unpacking._write_split", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        (tmp_path / "out").mkdir()
        (tmp_path / "out/.unfinished").write_bytes(f"unpack {read_index(tmp_path / 'p').digest}\n".encode())
        with pytest.raises(KeyboardInterrupt):
            unpack(tmp_path / "p", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="expected a finished data set"):
        open_it(tmp_path / "out")
    assert unpack(tmp_path / "p", tmp_path / "out", progress=False) == {"train": 23, "eval": 7}
    assert tree(tmp_path / "out") == tree(folders)


def test_starting_costs_nothing_a_sample(tmp_path):
    """An opening stats the shards, and reads neither tokens nor names."""
    rows, length = 200_000, sum(LENGTHS)
    write_tokens(tmp_path / "root", "train", 2, seed=0)
    pack_it(tmp_path / "root", out=tmp_path / "p")

    class Many:
        def __init__(self):
            self.what, self.meta, self.columns = "many", {}, read_index(tmp_path / "p").columns
            self.splits = {"train": [f"x{number:09d}" for number in range(rows)]}

        def stamp(self, split, chosen):
            return "same"

        def read(self, split, chosen):
            tokens = np.full((len(chosen), length), 7, np.uint16)
            names = [self.splits[split][row] for row in chosen]
            nothing = [None] * len(chosen)
            return Block(tokens, Samples(names, nothing, nothing, nothing), {})

    packing.add(Many(), tmp_path / "p", read_index(tmp_path / "p"), progress=False)
    start = time.perf_counter()
    store = open_it(tmp_path / "p")
    assert time.perf_counter() - start < 0.25
    assert len(store) == rows + 2
    assert store.pids[-1] == f"x{rows - 1:09d}"
    np.testing.assert_array_equal(store.tokens[[2, rows]], 7)
