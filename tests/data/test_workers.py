"""Jobs over processes: all done, errors raised, an interruption that does not wait for the rest."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

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
