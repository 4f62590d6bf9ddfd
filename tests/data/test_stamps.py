"""Changed files are seen, whatever size and times they have; unchanged ones are not read again."""

import os
import shutil
import subprocess
import tarfile
import time

import numpy as np
import pytest

from m4.data import store as store_module
from m4.data.frames import order_frames
from m4.data.preparation import prepare as prepare_module
from m4.data.preparation.prepare import prepare
from m4.data.stamps import FileStamp
from m4.data.store import open_store
from m4.errors import DataError
from tests.data.test_store import expected, open_it, tokens, write

FIXED = 1_700_000_000


def fix_times(root):
    """The same times of access and modification for everything."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (FIXED, FIXED))


def archive_of(root, path):
    with tarfile.open(path, "w") as archive:
        archive.add(root, arcname=".", filter=lambda info: None if "/.cache" in info.name else info)
    return path


def unpack_by_tar(root, archive):
    subprocess.run(["tar", "-xf", archive, "-C", root], check=True)


def unpack_by_python(root, archive):
    with tarfile.open(archive) as opened:
        for member in opened:
            if member.isfile():
                (root / member.name).write_bytes(opened.extractfile(member).read())
                os.utime(root / member.name, (FIXED, FIXED))


def unpack_by_copying(root, archive):
    subprocess.run(["cp", "-a", f"{archive.with_suffix('')}/.", root], check=True)


def unpack_by_renaming(root, archive):
    source = archive.with_suffix("")
    for path in source.rglob("*.npy"):
        path.rename(root / path.relative_to(source))


@pytest.mark.parametrize("unpack", [unpack_by_tar, unpack_by_python, unpack_by_copying, unpack_by_renaming])
def test_other_tokens_of_equal_size_and_time_are_packed_anew(tmp_path, unpack):
    """Two data sets of one shape, their files dated alike: the second is unpacked over the first."""
    root, other = write(tmp_path / "root", *tokens(0)), write(tmp_path / "other", *tokens(1))
    for made in (root, other):
        fix_times(made)
    archive = archive_of(other, tmp_path / "other.tar")
    first = open_it(root)
    unpack(root, archive)
    status = (root / "train/rgb/000000/rgb.npy").stat()
    assert status.st_mtime == FIXED  # the very case
    second = open_it(root)
    np.testing.assert_array_equal(second.tokens, expected(*tokens(1)))
    assert second.fingerprint != first.fingerprint


def test_samples_that_changed_places_are_packed_anew(tmp_path):
    """Folders renamed: not one file has a new status, but each has another name."""
    rgb, coords = tokens(0)
    root = write(tmp_path, rgb, coords)
    for path in root.rglob("*.npy"):
        os.utime(path, (FIXED, FIXED))
    open_it(root)
    base = root / "train/rgb"
    (base / "000001").rename(base / "away")
    (base / "000002").rename(base / "000001")
    (base / "away").rename(base / "000002")
    rgb[[1, 2]] = rgb[[2, 1]]
    np.testing.assert_array_equal(open_it(root).tokens, expected(rgb, coords))


def test_a_link_to_another_file_is_seen(tmp_path):
    rgb, coords = tokens(0)
    root = write(tmp_path / "root", rgb, coords)
    path = root / "train/rgb/000003/rgb.npy"
    path.rename(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", rgb[4].astype(np.int32))
    for name in ("a.npy", "b.npy"):
        os.utime(tmp_path / name, (FIXED, FIXED))
    path.symlink_to(tmp_path / "a.npy")
    open_it(root)
    path.unlink()
    path.symlink_to(tmp_path / "b.npy")
    rgb[3] = rgb[4]
    np.testing.assert_array_equal(open_it(root).tokens, expected(rgb, coords))


@pytest.mark.parametrize("elsewhere", ["cp -a", "mv"])
def test_a_root_in_another_place_gives_its_own_tokens(tmp_path, elsewhere):
    """With its cache: a copy that was changed before it was opened, or the whole root moved."""
    rgb, coords = tokens(0)
    root = write(tmp_path / "root", rgb, coords)
    fix_times(root)
    fingerprint = open_it(root).fingerprint
    subprocess.run([*elsewhere.split(), root, tmp_path / "there"], check=True)
    assert open_it(tmp_path / "there").fingerprint == fingerprint
    rgb[5] = 7
    np.save(tmp_path / "there/train/rgb/000005/rgb.npy", rgb[5].astype(np.int32))
    fix_times(tmp_path / "there")
    np.testing.assert_array_equal(open_it(tmp_path / "there").tokens, expected(rgb, coords))


def stamp_of(path):
    os.utime(path, (FIXED, FIXED))
    stamp = FileStamp()
    stamp.add("x", path.stat())
    return stamp


def test_a_change_within_the_same_clock_tick_is_seen(tmp_path):
    """Written, stamped and written again at once: the kernel's clock stands still for milliseconds."""
    path = tmp_path / "x"
    for _ in range(20):
        path.write_bytes(b"a")
        before = stamp_of(path)
        before.settle()
        # Newer kernels look at a finer clock once a file's status has been read; the wait is for the others.
        assert time.time_ns() - path.stat().st_ctime_ns >= 50_000_000
        path.write_bytes(b"b")
        assert stamp_of(path).hexdigest() != before.hexdigest()


def test_a_store_opened_between_two_changes(tmp_path):
    rgb, coords = tokens(0, samples=2)
    root = write(tmp_path, rgb, coords)
    path = root / "train/rgb/000001/rgb.npy"
    for value in range(8):
        rgb[1] = value
        np.save(path, rgb[1].astype(np.int32))
        os.utime(path, (FIXED, FIXED))
        np.testing.assert_array_equal(open_it(root).tokens, expected(rgb, coords))


def test_files_that_change_while_they_are_packed_are_refused(tmp_path, monkeypatch):
    root = write(tmp_path, *tokens())
    read_packable = store_module.read_packable

    def meddle(root, modality, *arguments):
        rows = read_packable(root, modality, *arguments)
        np.save(root / "train/rgb/000002/rgb.npy", np.zeros((16, 16), np.int32))
        return rows

    monkeypatch.setattr(store_module, "read_packable", meddle)
    with pytest.raises(DataError, match=r"train: expected token files that stay as they are while they are packed"):
        open_it(root)
    monkeypatch.undo()
    assert open_it(root).tokens[2, :256].max() == 0


def test_names_that_are_not_utf_8(tmp_path):
    rgb, coords = tokens()
    root = write(tmp_path / os.fsdecode(b"\xff"), rgb, coords)
    path = root / "train/rgb/000002/rgb.npy"
    path.rename(path.with_name(os.fsdecode(b"\xfe.npy")))
    for cache in (None, tmp_path / "cache"):
        np.testing.assert_array_equal(open_it(root, cache_dir=cache).tokens, expected(rgb, coords))


def test_the_stamp_of_files_is_cheap(tmp_path):
    """A stat a file, and some microseconds: 200,000 files are seen through in seconds."""
    path = tmp_path / "x"
    path.touch()
    status = path.stat()
    stamp, start = FileStamp(), time.process_time()
    for number in range(20_000):
        stamp.add(f"rgb/{number:06d}/rgb.npy", status)
    assert time.process_time() - start < 1
    start = time.perf_counter()
    stamp.settle()
    assert time.perf_counter() - start < 1


# Preparation


@pytest.fixture
def copied(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "penn")
    fix_times(tmp_path / "penn")
    return tmp_path / "penn"


def counted(monkeypatch):
    """The names of videos that are tokenized from now on."""
    done = []
    original = prepare_module.tokenize_video

    def count(video, options):
        done.append(video.name)
        return original(video, options)

    monkeypatch.setattr(prepare_module, "tokenize_video", count)
    return done


def test_a_frame_of_equal_size_and_time_is_seen(copied, prepared, tmp_path, monkeypatch, tree):
    """Two frames of one video change places, padded to one size and dated alike."""
    names = sorted(path.name for path in (copied / "frames/0002").iterdir())
    paths = [copied / "frames/0002" / name for name in order_frames(copied, names)]
    size = max(path.stat().st_size for path in paths)
    contents = [path.read_bytes().ljust(size, b"\0") for path in paths]  # bytes after a JPEG's end are ignored
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    fix_times(copied)
    out = tmp_path / "out"
    prepare(copied, out, progress=False)
    assert {name: content for name, content in tree(out).items() if name != "meta.json"} == {
        name: content for name, content in tree(prepared).items() if name != "meta.json"
    }
    done = counted(monkeypatch)
    for path, content in zip(paths, contents[::-1], strict=True):
        path.write_bytes(content)
    fix_times(copied)
    assert prepare(copied, out, progress=False).fresh
    assert done == ["0002"]
    prepare(copied, tmp_path / "anew", progress=False)
    assert tree(out) == tree(tmp_path / "anew")


def test_a_copy_of_the_videos_is_read_but_not_tokenized_again(copied, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(copied, out, progress=False)
    done = counted(monkeypatch)
    read = []
    content_of = prepare_module.content_of
    monkeypatch.setattr(prepare_module, "content_of", lambda *a: read.append(1) or content_of(*a))
    prepare(copied, out, progress=False)
    assert not read  # status alone
    shutil.copytree(copied, tmp_path / "copy")
    prepare(tmp_path / "copy", out, progress=False)
    assert len(read) == 5
    prepare(tmp_path / "copy", out, progress=False)
    assert len(read) == 5
    assert not done


def test_work_of_an_older_version_is_done_again(copied, prepared, tmp_path, monkeypatch, tree):
    """Its stamp of names and sizes says nothing of the content; tokens whose frames are gone are kept."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    for name in ("0001", "0002"):
        path = out / f".videos/{name}.npz"
        arrays = dict(np.load(path))
        arrays["source"] = np.array("0" * 64)
        del arrays["content"]
        path.write_bytes(prepare_module.pack_video(arrays))
        (out / f".videos/{name}.status").unlink()
    shutil.rmtree(copied / "frames/0001")
    done = counted(monkeypatch)
    prepare(copied, out, progress=False)
    assert done == ["0002"]
    shown = {name: content for name, content in tree(out).items() if name != "meta.json"}
    assert shown == {name: content for name, content in tree(prepared).items() if name != "meta.json"}


def test_the_store_sees_a_root_prepared_anew(copied, tmp_path):
    """The same out for other videos of equal sizes: what training opens is what was prepared last."""
    out = tmp_path / "out"
    prepare(copied, out, progress=False)
    arguments = (["tok_rgb", "coords"], [64_000, 8192], [256, 39])
    first = open_store(out, "train", *arguments)
    for path in out.rglob("train/*/*/*"):
        os.utime(path, (FIXED, FIXED))
    open_store(out, "train", *arguments)
    victim = next(out.glob("train/coords/*/*"))
    array = np.load(victim)
    array[0, 0] ^= 1
    np.save(victim, array)
    os.utime(victim, (FIXED, FIXED))
    assert open_store(out, "train", *arguments).fingerprint != first.fingerprint
