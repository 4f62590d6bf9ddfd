"""Several processes at one output: the second waits, says so, and finds it done; a kill leaves nothing half-made."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from m4.data.frames import frame_names
from m4.data.layout import SPLITS
from m4.data.locking import LOCK, locked
from m4.data.penn_action import list_videos, open_video, read_label
from m4.data.store import open_store
from m4.data.synthetic.synth import synthesize
from tests.data.conftest import SMALL, STORE
from tests.runs import environment

OPEN = f"from m4.data.store import open_store; import sys; open_store(sys.argv[1], 'train', *{STORE!r})"


def start(*arguments, **options):
    module = () if arguments[0] == "-c" else ("-m", "m4.data")
    return subprocess.Popen(
        [sys.executable, *module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **options,
    )


def ended(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out, err


@pytest.mark.parametrize("command", ["synth", "prepare", "a shard", "split", "sample", "store"])
def test_the_second_process_waits_and_says_for_whom(videos, prepared, tmp_path, command):
    """This process holds the lock; the command prints one line with its id and goes on when it is let go."""
    out = tmp_path / "out"
    folder, lock = out, LOCK
    if command == "synth":
        out.mkdir()
        arguments = ["synth", "--out", out, "--videos", 1, "--frames", 2, "--size", "64x64"]
    elif command == "prepare":
        out.mkdir()
        arguments = ["prepare", "--penn-action", videos, "--out", out]
    elif command == "a shard":
        (out / ".videos").mkdir(parents=True)
        folder, lock = out / ".videos", ".shard-0-of-2.lock"
        arguments = ["prepare", "--penn-action", videos, "--out", out, "--shard", "0/2"]
    elif command == "sample":
        (out / "videos").mkdir(parents=True)
        folder = out / "videos"
        arguments = ["sample", "--out", out, "--videos", 1, "--workers", 1]
    else:
        shutil.copytree(prepared, out)
        arguments = ["split", out, "--seed", 5]
    if command == "store":
        open_store(out, "train", *STORE)
        index = next((out / ".cache").glob("*.json"))
        folder, lock = out / ".cache", f".{index.stem}.lock"
        index.unlink()
        process = None
    with locked(folder / lock, "test"):
        if command == "store":
            code = f"import logging; logging.basicConfig(level=logging.INFO, format='%(message)s'); {OPEN}"
            process = start("-c", code, out)
        else:
            process = start(*arguments)
        line = next(line for line in process.stderr if "waiting" in line)
        shown = folder if command in ("store", "sample") else out
        assert f"waiting for process {os.getpid()} on " in line
        assert line.rstrip().endswith(f"which is at work in {shown}")
        assert process.poll() is None
    _, err = ended(process)
    assert "waiting" not in err


def test_two_first_runs_of_the_sample_set(tmp_path, tree):
    """As training without data.root starts them: both end well, with the set that one of them alone would make."""
    arguments = ["sample", "--videos", 3, "--workers", 1, "--out"]
    together = [start(*arguments, tmp_path / "both") for _ in range(2)]
    said = [ended(process)[1] for process in together]
    ended(start(*arguments, tmp_path / "alone"))
    assert tree(tmp_path / "both") == tree(tmp_path / "alone")
    assert sum("waiting for process" in err for err in said) >= 1
    videos = tmp_path / "both/videos"
    for name in list_videos(videos):
        assert len(open_video(videos, name).frames) == len(read_label(videos / f"labels/{name}.mat")) >= 20


def test_two_runs_of_prepare_and_of_the_store(videos, prepared, tmp_path, tree):
    out = tmp_path / "out"
    for process in [start("prepare", "--penn-action", videos, "--out", out) for _ in range(2)]:
        ended(process)
    assert tree(out) == tree(prepared)
    code = f"import logging; logging.basicConfig(level=logging.INFO, format='%(message)s'); {OPEN}"
    said = [ended(process)[1] for process in [start("-c", code, out) for _ in range(2)]]
    assert sum(err.count("packed ") for err in said) == 1


def test_splits_by_other_seeds_do_not_mix(prepared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (out / ".videos").rename(tmp_path / "away")  # samples of others' making: moved one by one
    for process in [start("split", out, "--seed", seed, "--unit", "pair") for seed in (1, 2)]:
        ended(process)
    found = {modality: [] for modality in ("tok_rgb", "coords", "tok_rgb_next", "coords_next", "captions")}
    for modality, pids in found.items():
        for split in SPLITS:
            pids.append(sorted(path.name for path in (out / split / modality).iterdir()))
    assert len({str(pids) for pids in found.values()}) == 1
    assert len(open_store(out, "train", *STORE)) == len(found["coords"][0])


def test_shards_of_one_output_do_not_wait_for_each_other(videos, prepared, tmp_path, tree):
    out = tmp_path / "out"
    (out / ".videos").mkdir(parents=True)
    with locked(out / ".videos/.shard-0-of-2.lock", "test"):
        ended(start("prepare", "--penn-action", videos, "--out", out, "--shard", "1/2"))
    ended(start("prepare", "--penn-action", videos, "--out", out, "--shard", "0/2"))
    assert tree(out) == tree(prepared)


def test_the_lock_falls_with_its_holder(tmp_path):
    code = (
        "import sys, time; from m4.data.locking import locked\n"
        "with locked(sys.argv[1], 'there'):\n    print('held', flush=True); time.sleep(600)"
    )
    process = start("-c", code, tmp_path / "lock")
    assert process.stdout.readline() == "held\n"
    assert f"process {process.pid} on " in (tmp_path / "lock").read_text()
    process.kill()
    process.wait()
    with locked(tmp_path / "lock", "here"):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == ""


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path / "lock", "out"):
        assert "has no locks (" in caplog.text


def test_a_killed_synth_leaves_no_part(tmp_path, tree):
    """kill -9 while frames are drawn: what stands under a video's name is whole, and the rest is swept away later."""
    synthesize(tmp_path / "alone", SMALL, progress=False)
    out = tmp_path / "out"
    code = (
        "import sys; from tests.data.conftest import SMALL; from m4.data.synthetic.synth import synthesize; "
        "synthesize(sys.argv[1], SMALL, progress=False)"
    )
    process = start("-c", code, out)
    deadline = time.monotonic() + 120
    while not list(out.glob("frames/.*.tmp/000004.jpg")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for path in (out / "frames").iterdir():
        if not path.name.startswith("."):
            assert len(list(path.iterdir())) == len(list((tmp_path / "alone/frames" / path.name).iterdir()))
    assert list(out.glob("frames/.*.tmp"))
    synthesize(out, SMALL, progress=False)
    assert tree(out) == tree(tmp_path / "alone")
    assert not list(out.glob("*/.*.tmp"))


@pytest.mark.parametrize("harm", ["8 frames", "another frame", "no folder", "label cut", "old temporaries"])
def test_a_half_made_video_of_an_older_version_is_drawn_again(videos, tmp_path, tree, harm):
    """Its label is there, but not its frames: it used to be taken for whole for ever."""
    out = tmp_path / "penn"
    shutil.copytree(videos, out)
    folder, label = out / "frames/0003", out / "labels/0003.mat"
    if harm == "8 frames":
        for frame in sorted(frame_names(folder))[3:]:
            (folder / frame).unlink()
    elif harm == "another frame":
        (folder / "000001.jpg").rename(folder / "000099.jpg")
    elif harm == "no folder":
        shutil.rmtree(folder)
    elif harm == "label cut":
        label.write_bytes(label.read_bytes()[:300])
    else:
        shutil.copytree(folder, out / "frames/.0003.tmp")
        (out / "labels/.0003.tmp").write_bytes(b"x")
    kept = (out / "frames/0001/000001.jpg").stat().st_mtime_ns
    synthesize(out, SMALL, progress=False)
    assert tree(out) == tree(videos)
    assert (out / "frames/0001/000001.jpg").stat().st_mtime_ns == kept
    assert not list(out.glob("*/.*.tmp"))


def test_poses_of_another_folder_are_drawn_anew(tmp_path):
    """The same names and options, but other label files: finished videos are not those asked for."""
    from m4.data.penn_action import write_label
    from m4.data.synthetic.clips import SynthOptions
    from tests.data.test_penn_action import label

    options = SynthOptions(videos=1, frames=(2, 2))
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        record = label()
        record.x[:] += number
        write_label(tmp_path / name / "0001.mat", record)
        synthesize(tmp_path / "out", options, tmp_path / name, progress=False)
        np.testing.assert_array_equal(read_label(tmp_path / "out/labels/0001.mat").x, record.x[:2])
