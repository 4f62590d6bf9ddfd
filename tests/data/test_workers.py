"""Jobs over processes: all done, errors raised, an interruption that does not wait for the rest."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from m4.data.workers import for_each


def touch(folder, number):
    if number < 0:
        raise ValueError(f"job {number}")
    (folder / str(number)).touch()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done(tmp_path, workers):
    for_each("test", partial(touch, tmp_path), range(7), workers, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(7)}
    for_each("test", partial(touch, tmp_path), [], workers, progress=False)
    with pytest.raises(ValueError, match="job -1"):
        for_each("test", partial(touch, tmp_path), [-1, 1, 2], workers, progress=False)


def test_interrupted_from_the_keyboard(tmp_path):
    """Ctrl-C ends a run of thousands of videos at once, says how to continue, and leaves no worker behind."""
    command = [sys.executable, "-m", "m4.data", "synth", "--out", str(tmp_path / "penn"), "--videos", "3000"]
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("penn/labels/*.mat")):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)  # returns when the last worker has closed its stderr
    assert process.returncode == 130
    assert err.rstrip().endswith("interrupted; run the same command again to continue")
    assert "Traceback" not in err
    assert len(list(tmp_path.glob("penn/labels/*.mat"))) < 1000


def _children(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listing.stdout.split()]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes from /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    """kill -9 of the parent: its workers stop within seconds, although thousands of videos are still queued."""
    command = [sys.executable, "-m", "m4.data", "synth", "--out", str(tmp_path / "penn"), "--videos", "3000"]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("penn/labels/*.mat")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = _children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    try:
        while any(map(_alive, workers)):
            assert time.monotonic() < deadline, "workers go on without their parent"
            time.sleep(0.05)
    finally:
        for worker in filter(_alive, workers):
            os.kill(worker, signal.SIGKILL)
