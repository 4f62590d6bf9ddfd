"""Stop signals: at once outside, later inside a deferred block."""

import os
import signal
import subprocess
import sys
import time

import pytest

from m4.run.signals import STOP_SIGNALS, Interrupted, StopSignals
from tests.runs import environment


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_raises_at_once(signum, status):
    with StopSignals(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signum)
    assert caught.value.exit_status == status


def test_deferred_block_finishes():
    done = []
    with StopSignals() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("whole")
        assert done == ["whole"]
        with pytest.raises(Interrupted):
            stop.check()


def test_second_signal_does_not_break_into_the_saving():
    with StopSignals() as stop:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT


def test_deferred_blocks_nest():
    with StopSignals() as stop:
        with stop.deferred():
            with stop.deferred():
                pass
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.check()


def test_the_first_signal_is_the_status():
    with StopSignals() as stop, stop.deferred():
        for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
        assert stop.received == signal.SIGUSR1


def test_handlers_are_restored():
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with StopSignals():
        assert all(signal.getsignal(signum) != old for signum, old in zip(STOP_SIGNALS, before, strict=True))
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


_DEAF = """
import sys, time, torch
from m4.run.signals import StopSignals
with StopSignals() as stop:
    with stop.deferred():
        print("ready", flush=True)
        torch.randn(10**6).repeat(400).sort()  # many seconds of C code, in which no handler of Python's runs
    print("whole", flush=True)
"""


@pytest.mark.parametrize(("pause", "second"), [(1.0, signal.SIGINT), (0.0, signal.SIGINT), (1.0, signal.SIGTERM)])
def test_a_second_ctrl_c_leaves_at_once_even_out_of_c_code(pause, second):
    """But not the echo of the first, nor another SIGTERM: these let the block finish."""
    process = subprocess.Popen(
        [sys.executable, "-c", _DEAF], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(pause)
    start = time.monotonic()
    process.send_signal(second)
    if pause and second == signal.SIGINT:
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "leaving at once" in errors
        assert "whole" not in said
        assert time.monotonic() - start < 3
        return
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.communicate()
