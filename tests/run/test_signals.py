"""Stop signals: at once outside, later inside a deferred block."""

import os
import signal

import pytest

from m4.run.signals import Interrupted, StopSignals


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
