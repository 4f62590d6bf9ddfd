"""Packed data sets that were harmed, cut off, or changed under our hands: named, mended, never mixed up."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest

from m4.data.packed import check, packing
from m4.data.packed.index import INDEX, JOURNAL, SHARDS, read_index
from m4.data.packed.packing import pack
from m4.data.packed.splits import split_packed
from m4.errors import DataError
from tests.data.packed_sets import assert_same, halves, open_it, pack_it


def harm_truncate(root, path):
    path.write_bytes(path.read_bytes()[:-10])


def harm_flip(root, path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def harm_remove(root, path):
    path.unlink()


def harm_mix(root, path):
    """The shard of another data set in the place of one of ours."""
    other = next(p for p in sorted((root / SHARDS).iterdir()) if p.suffix == path.suffix and p != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("kind", "harm"),
    [
        *((kind, harm) for kind in (".u16", ".json") for harm in (harm_truncate, harm_flip, harm_remove, harm_mix)),
        *((INDEX, harm) for harm in (harm_truncate, harm_flip, harm_remove)),
    ],
)
def test_harm_is_named_with_the_file_and_what_to_do(folders, tmp_path, kind, harm):
    root = tmp_path / "p"
    pack_it(folders, out=root, shard_rows=4)
    path = root / INDEX if kind == INDEX else sorted((root / SHARDS).glob(f"*{kind}"))[0]
    harm(root, path)
    if kind == INDEX and harm is harm_remove:
        with pytest.raises(DataError, match="expected the folders train, eval, test, found none"):
            open_it(root)
        return
    for act in (lambda: open_it(root), lambda: split_packed(root, unit="pair"), lambda: pack_it(folders, out=root)):
        with pytest.raises(DataError) as caught:
            act()
        assert str(path) in str(caught.value)
        assert "Restore it from a copy, or delete the folder and pack the data again" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_row_list_is_checked_too(folders, tmp_path):
    one, two = halves(folders, tmp_path)
    pack_it(one, two, out=tmp_path / "p")
    path = next((tmp_path / "p" / SHARDS).glob("*.rows"))
    content = np.fromfile(path, "<i8")
    content[:2] = content[1::-1]
    path.write_bytes(content.tobytes())
    with pytest.raises(DataError, match=path.name):
        open_it(tmp_path / "p")


def test_files_are_read_once(folders, tmp_path, monkeypatch):
    """The digests of what has not changed are not computed again: not by the next start, not when more is added."""
    root, read = tmp_path / "p", []
    original = check._read_through
    monkeypatch.setattr(
        check, "_read_through", lambda root, index, names: read.append(names) or original(root, index, names)
    )
    one, two = halves(folders, tmp_path)
    pack_it(two, out=root, shard_rows=4)
    assert len(read) == 1
    assert sorted(read.pop()) == sorted(read_index(root).files())
    old = set(read_index(root).files())
    for split in ("train", "eval", "train"):
        open_it(root, split)
    assert read == []
    pack_it(one, out=root, shard_rows=4)
    assert len(read) == 1
    assert not set(read.pop()) & old
    shutil.copytree(root, tmp_path / "copy")  # other files: their content is not known
    open_it(tmp_path / "copy")
    assert sorted(read.pop()) == sorted(read_index(root).files())
    path = next((root / SHARDS).glob("*.u16"))
    os.utime(path)
    open_it(root)
    assert read == [[path.name]]


def test_a_folder_that_cannot_be_written_to(folders, tmp_path, caplog, monkeypatch):
    """Checked at every start, which the log says, or once with a cache folder of one's own."""
    root = tmp_path / "p"
    pack_it(folders, out=root)
    shutil.rmtree(root / ".cache")
    (root / ".cache").touch()
    for _ in range(2):
        caplog.clear()
        open_it(root)
        assert "set data.cache_dir to a folder of your own" in caplog.text
    caplog.clear()
    open_it(root, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(check, "_read_through", None)
    open_it(root, cache_dir=tmp_path / "cache")
    assert caplog.text == ""


def pack_and_kill(one, out, delay) -> bool:
    """Pack in a process that is killed after so many seconds; whether it was still at work."""
    child = os.fork()
    if not child:
        try:
            pack([one], out, shard_rows=2, progress=False)
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_killed_at_any_moment(folders, tmp_path, tree):
    """Again and again, as a new data set and as an addition: what readers see is the old or the new one, whole, and the
    same command ends with the same bytes as if it had not been disturbed."""
    one, two = halves(folders, tmp_path)
    pack_it(two, out=tmp_path / "old", shard_rows=2)
    expected = {}
    for start in ("new", "addition"):
        if start == "addition":
            shutil.copytree(tmp_path / "old", tmp_path / "undisturbed addition")
        began = time.perf_counter()
        pack_it(one, out=tmp_path / f"undisturbed {start}", shard_rows=2)
        took = time.perf_counter() - began
        expected[start] = tree(tmp_path / f"undisturbed {start}")
    rng, kills, resumed = random.Random(0), 0, 0
    for start in ("new", "addition"):
        out = tmp_path / f"killed {start}"
        if start == "addition":
            shutil.copytree(tmp_path / "old", out)
        for _ in range(12):
            if pack_and_kill(one, out, rng.uniform(0.01, 0.7) * took):
                kills += 1
            else:  # it was faster: from the beginning again
                assert tree(out) == expected[start]
                shutil.rmtree(out)
                if start == "addition":
                    shutil.copytree(tmp_path / "old", out)
            resumed += (out / JOURNAL).exists() and len(json.loads((out / JOURNAL).read_text())) > 0
            if (out / INDEX).exists():
                assert len(open_it(out)) in (len(open_it(two)), len(open_it(folders)), len(open_it(one)))
            elif out.exists() and (out / JOURNAL).exists():
                with pytest.raises(DataError, match="being packed, or was when a run was cut off"):
                    open_it(out)
        pack_it(one, out=out, shard_rows=2)
        assert tree(out) == expected[start]
    assert kills >= 6
    assert resumed >= 1


def test_shards_that_are_done_are_not_done_again(folders, tmp_path, monkeypatch):
    written, original = [], packing._write_shard

    def stops(folder, source, split, rows, *rest):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append((split, rows))
        return original(folder, source, split, rows, *rest)

    monkeypatch.setattr(packing, "_write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        pack_it(folders, out=tmp_path / "p", shard_rows=4)
    first = list(written)
    written.clear()
    pack_it(folders, out=tmp_path / "p", shard_rows=4)  # four of eight are left
    assert len(written) == 4
    assert not [shard for shard in written if shard in first]
    assert_same(tmp_path / "p", folders)
    assert not (tmp_path / "p" / JOURNAL).exists()


def test_a_source_that_changes_is_packed_anew(folders, tmp_path, monkeypatch):
    shutil.copytree(folders, tmp_path / "root")
    original = packing._joined

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "_joined", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_it(tmp_path / "root", out=tmp_path / "p", shard_rows=4)
    monkeypatch.setattr(packing, "_joined", original)
    np.save(tmp_path / "root/train/coords/000001/coords.npy", np.full(6, 9, np.uint16))
    pack_it(tmp_path / "root", out=tmp_path / "p", shard_rows=4)
    assert_same(tmp_path / "p", tmp_path / "root")
