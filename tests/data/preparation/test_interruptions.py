"""Preparation cut off at any moment: killed, out of disk, with damaged work; what readers see, and how it goes on."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.prepare import merge, prepare
from m4.data.store import open_store
from m4.errors import DataError
from tests.data.conftest import STORE, table


class Killed(BaseException):
    """Stands for kill -9 at a chosen step: nothing is cleaned up."""


def die_at(monkeypatch, step):
    """Let the ``step``-th change of the layout (a file or folder renamed, removed or exchanged) not happen any more."""
    left = [step]

    def guarded(change):
        def run(*arguments, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return change(*arguments, **options)

        return run

    for name in ("rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return left


def mixed(root, wholes):
    """Whether a reader would take ``root`` for whole while it is none of ``wholes``."""
    try:
        store = open_store(root, "train", *STORE), open_store(root, "eval", *STORE)
    except DataError:
        return False
    return tuple(part.pids for part in store) not in wholes


def test_a_full_disk_is_named_and_nothing_is_lost(videos, prepared, tmp_path, tree):
    """Files may grow to 4 kB only, as if the disk were full: one line, no half-written video, and it goes on later."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "m4.data", "prepare", "--penn-action", str(videos), "--out", str(out)]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.match(r"error: .*/\.videos/000\d\.npz: File too large", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not list(out.glob(".videos/*.npz"))
    prepare(videos, out, progress=False)
    assert tree(out) == tree(prepared)


def test_damaged_work_is_done_again_or_named(videos, prepared, tmp_path, tree):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    damaged = out / ".videos/0003.npz"
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(DataError, match=r"0003\.npz: expected the tokens of a video, found a damaged file"):
        merge(out, seed=8)
    prepare(videos, out, progress=False)
    assert tree(out) == tree(prepared)
    (out / ".videos/options.json").write_text("{")
    with pytest.raises(DataError, match=r"options\.json: expected JSON"):
        prepare(videos, out, progress=False)


def test_killed_and_resumed(videos, prepared, tmp_path, tree):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "m4.data", "prepare", "--penn-action", str(videos), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob(".videos/*.npz")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "meta.json").exists() or len(table(out)) == len(table(prepared))
    prepare(videos, out, progress=False)
    assert tree(out) == tree(prepared)


def test_killed_at_any_step_of_laying_out(videos, prepared, tmp_path, tree, monkeypatch):
    """The old layout, the new one, or one that is refused; and the next run finishes it."""
    out = tmp_path / "out"
    prepare(videos, out, PrepareOptions(seed=3), progress=False)
    before = tmp_path / "before"
    shutil.copytree(out, before)
    wholes = [
        tuple(open_store(root, split, *STORE, cache_dir=tmp_path / "cache").pids for split in ("train", "eval"))
        for root in (before, prepared)
    ]
    assert wholes[0] != wholes[1]
    for step in (0, 1, 2, 5, 40, 10_000):
        shutil.rmtree(out)
        shutil.copytree(before, out)
        with monkeypatch.context() as patch:
            left = die_at(patch, step)
            try:
                prepare(videos, out, progress=False)
            except Killed:
                assert step < 10_000
            else:
                assert left[0] > 0
        assert not mixed(out, wholes), step
        prepare(videos, out, progress=False)
        assert tree(out) == tree(prepared), step


def test_killed_at_any_step_of_the_first_layout(videos, prepared, tmp_path, tree, monkeypatch):
    """Readers see nothing, or all of it."""
    shutil.copytree(prepared / ".videos", tmp_path / "done/.videos")
    moves = len(table(prepared)) * 5
    steps = (0, 1, moves // 2, *range(moves, moves + 12), 10_000)
    finished = 0
    for step in steps:
        out = tmp_path / f"out{step}"
        shutil.copytree(tmp_path / "done", out)
        with monkeypatch.context() as patch:
            die_at(patch, step)
            try:
                merge(out)
            except Killed:
                pass
            else:
                finished += 1
        if step < moves:
            assert not (out / "train").exists()
        assert not mixed(out, [tuple(open_store(prepared, s, *STORE).pids for s in ("train", "eval"))]), step
        merge(out)
        assert tree(out) == tree(prepared), step
    assert 0 < finished < len(steps) - 5
