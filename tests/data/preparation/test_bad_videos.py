"""One bad video never ends a run: it is in the summary with its reason, and the others are done."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from m4.data import frames as frames_module
from m4.data.__main__ import main
from m4.data.preparation import prepare as prepare_module
from m4.data.preparation.prepare import merge, prepare
from tests.data.conftest import table


@pytest.fixture
def copied(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "penn")
    return tmp_path / "penn"


def rewrite(root, **changes):
    path = root / "labels/0002.mat"
    fields = {key: value for key, value in scipy.io.loadmat(path).items() if not key.startswith("__")}
    scipy.io.savemat(path, {key: value for key, value in {**fields, **changes}.items() if value is not None})


def replace_label(root, make):
    (root / "labels/0002.mat").unlink()
    make(root / "labels/0002.mat")


def replace_frame(root, make):
    (root / "frames/0002/000003.jpg").unlink()
    make(root / "frames/0002/000003.jpg")


def replace_folder(root, make):
    shutil.rmtree(root / "frames/0002")
    make(root / "frames/0002")


def number_of(root):
    return len(list((root / "frames/0002").iterdir()))


FAULTS = {
    "empty train": (lambda r: rewrite(r, train=np.zeros((0, 0), np.int32)), "train with 1 values, found shape (0,)"),
    "text in train": (lambda r: rewrite(r, train=np.array(["yes"])), "numbers in train"),
    "NaN in train": (lambda r: rewrite(r, train=np.array([[np.nan]])), "1 or -1 in train, found nan"),
    "two trains": (lambda r: rewrite(r, train=np.ones((1, 2))), "train with 1 values"),
    "empty action": (lambda r: rewrite(r, action=np.array([], dtype="U1")), "text in action, found nothing"),
    "no pose": (lambda r: rewrite(r, pose=None), "found no pose"),
    "complex joints": (lambda r: rewrite(r, x=np.ones((number_of(r), 13), complex)), "found dtype complex128"),
    "a cell of joints": (lambda r: rewrite(r, x=np.array([[1], [2]], object)), "numbers in x, found dtype object"),
    "sparse joints": (
        lambda r: rewrite(r, x=__import__("scipy.sparse").sparse.csc_matrix(np.ones((3, 13)))),
        "numbers in x, found dtype object",
    ),
    "flat joints": (lambda r: rewrite(r, y=np.ones(number_of(r) * 13)), "y with"),
    "no frames": (lambda r: rewrite(r, nframes=np.array([[0]])), "a whole number of frames in nframes, found 0.0"),
    "endless frames": (lambda r: rewrite(r, nframes=np.array([[np.inf]])), "found inf"),
    "half a pixel": (
        lambda r: rewrite(r, dimensions=np.array([[120.5, 161, number_of(r)]])),
        "positive sizes in whole pixels",
    ),
    "infinite size": (
        lambda r: rewrite(r, dimensions=np.array([[np.inf, 161, number_of(r)]])),
        "positive sizes in whole pixels",
    ),
    "MATLAB 7.3": (
        lambda r: replace_label(r, lambda p: p.write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n")),
        "one of version 7.3 (HDF5)",
    ),
    "a label that is a folder": (lambda r: replace_label(r, Path.mkdir), "0002.mat: expected a label file"),
    "a label that is a pipe": (lambda r: replace_label(r, os.mkfifo), "0002.mat: expected a label file"),
    "a label that links to nothing": (
        lambda r: replace_label(r, lambda p: p.symlink_to("gone")),
        "0002.mat: expected a label file, found No such file",
    ),
    "a frame that links to nothing": (
        lambda r: replace_frame(r, lambda p: p.symlink_to("gone")),
        "000003.jpg: expected a whole image file, found a link to nothing",
    ),
    "a frame that links to itself": (
        lambda r: replace_frame(r, lambda p: p.symlink_to(p.name)),
        "000003.jpg: expected a whole image file, found Too many levels of symbolic links",
    ),
    "a frame that is a folder": (lambda r: replace_frame(r, Path.mkdir), "000003.jpg: expected a whole image file"),
    "a frame that is a pipe": (lambda r: replace_frame(r, os.mkfifo), "000003.jpg: expected a whole image file"),
    "an empty frame": (lambda r: replace_frame(r, Path.touch), "000003.jpg: expected a whole image file"),
    "an inked frame": (
        lambda r: replace_frame(r, lambda p: Image.new("CMYK", (161, 120)).save(p)),
        "000003.jpg: expected pixels of 8 bits or 16-bit grey, found mode CMYK",
    ),
    "a frame of one pixel": (
        lambda r: replace_frame(r, lambda p: Image.new("RGB", (1, 1)).save(p)),
        "000003.jpg: expected 161x120 pixels",
    ),
    "frames that link to nothing": (
        lambda r: replace_folder(r, lambda p: p.symlink_to("gone")),
        "frames/0002: expected a folder of frames",
    ),
    "frames that are a file": (lambda r: replace_folder(r, Path.touch), "frames/0002: expected a folder of frames"),
    "an empty folder": (lambda r: replace_folder(r, Path.mkdir), "found 0"),
    "names without numbers": (
        lambda r: [p.rename(p.with_name(f"{'abcdefghijkl'[i]}.jpg")) for i, p in enumerate(r.glob("frames/0002/*"))],
        "which no number orders",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_video_is_its_own(copied, prepared, tmp_path, fault):
    make, mention = FAULTS[fault]
    make(copied)
    shutil.copytree(prepared, tmp_path / "out")  # the others are done already, but the bad one may not stay
    summary = prepare(copied, tmp_path / "out", progress=False)
    assert list(summary.bad) == ["0002"]
    assert mention in summary.bad["0002"]
    assert summary.videos == 4
    assert "0002" not in {row["video"] for row in table(tmp_path / "out")}
    assert len({row["video"] for row in table(tmp_path / "out")}) == 4


@pytest.mark.parametrize("name", [b"00\xff2", "längeres Video".encode("latin-1"), b"x" * 230])
def test_names_that_cannot_be_listed(copied, tmp_path, name, capsys):
    """Not UTF-8, or so long that the files of its work could not be named."""
    frames, labels = os.fsencode(copied / "frames"), os.fsencode(copied / "labels")
    os.rename(frames + b"/0002", frames + b"/" + name)
    os.rename(labels + b"/0002.mat", labels + b"/" + name + b".mat")
    command = ["prepare", "--penn-action", str(copied), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    out = capsys.readouterr().out
    out.encode("utf-8")  # can be printed
    assert "1 bad videos were left out" in out
    assert ("expected a name of at most 200 bytes" in out) == (name[:1] == b"x")
    assert ("expected a video with a name in UTF-8" in out) == (name[:1] != b"x")
    assert len({row["video"] for row in table(tmp_path / "out")}) == 4
    assert merge(tmp_path / "out").bad


def test_strange_names_that_are_no_fault(copied, tmp_path, capsys):
    """Line breaks, quotes, commas and other scripts in a video's name; other bytes in that of a frame."""
    name = 'two\nlines, "квадрат"'
    (copied / "frames/0002").rename(copied / "frames" / name)
    (copied / "labels/0002.mat").rename(copied / f"labels/{name}.mat")
    for frame in (copied / "frames/0003").iterdir():
        os.rename(frame, os.fsencode(frame.parent) + b"/\xff" + frame.name.encode())
    assert not prepare(copied, tmp_path / "out", progress=False).bad
    assert name in {row["video"] for row in table(tmp_path / "out")}
    (copied / f"labels/{name}.mat").write_bytes(b"")
    assert main(["prepare", "--penn-action", str(copied), "--out", str(tmp_path / "out")]) == 0
    assert "\n  two\\nlines, " in capsys.readouterr().out


@pytest.mark.parametrize("part", ["folder", "frame", "label"])
def test_what_may_not_be_read_is_named(copied, tmp_path, monkeypatch, part):
    """Permissions, which do not stop the superuser, so the calls refuse."""
    target = {"folder": "frames/0002", "frame": "frames/0002/000003.jpg", "label": "labels/0002.mat"}[part]
    target = str(copied / target)

    def refusing(call):
        def run(path, *arguments, **options):
            if not isinstance(path, int) and os.fspath(path) == target:
                raise PermissionError(errno.EACCES, "Permission denied", target)
            return call(path, *arguments, **options)

        return run

    import builtins
    import io

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(builtins, "open", refusing(builtins.open))
    monkeypatch.setattr(io, "open", refusing(io.open))
    summary = prepare(copied, tmp_path / "out", progress=False)
    assert list(summary.bad) == ["0002"]
    assert "Permission denied" in summary.bad["0002"]
    assert target in summary.bad["0002"]
    assert summary.videos == 4


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EDQUOT])
def test_faults_of_the_machine_end_the_run(copied, tmp_path, monkeypatch, code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(frames_module.Image, "open", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        prepare(copied, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out/.videos/*.bad"))


@pytest.mark.parametrize("bug", [TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError, AssertionError])
def test_bugs_are_not_taken_for_bad_videos(copied, tmp_path, monkeypatch, bug):
    def fail(*_):
        raise bug("a bug of ours")

    monkeypatch.setattr(prepare_module, "tokenize_video", fail)
    with pytest.raises(bug, match="a bug of ours"):
        prepare(copied, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out/.videos/*.bad"))
