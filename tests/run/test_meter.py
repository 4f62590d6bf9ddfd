"""Seconds a step, seconds for data, and the share of the peak, by a clock of the test's own."""

import pytest

from m4.model import ModelConfig
from m4.model.flops import training_flop
from m4.run import meter as module
from m4.run.meter import StepMeter

MODEL = ModelConfig(["a", "b"], [40, 24], [16, 16], dim=32, head_dim=8, enc_depth=3, dec_depth=2)


@pytest.fixture
def clock(monkeypatch):
    """A list whose only element is the time."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_by_hand(clock):
    meter = StepMeter(MODEL)
    clock[0] += 50
    meter.start(peak=1e6)

    def items():
        for item in "ab":
            clock[0] += 0.5
            yield item

    for targets in ([3, 4], [0, 9]):
        with meter.data():
            clock[0] += 1
        for _ in meter.each(items()):
            clock[0] += 2
        meter.step(30, targets)
        with meter.apart():
            clock[0] += 1000
    flop = training_flop(MODEL, 23, [3, 4]) + training_flop(MODEL, 21, [0, 9])
    assert meter.figures() == {"step_s": 6.0, "data_wait_s": 2.0, "mfu": pytest.approx(flop / (12 * 1e6))}
    clock[0] += 3
    meter.step(30, [3, 4])
    assert meter.figures() == {
        "step_s": 3.0,
        "data_wait_s": 0.0,
        "mfu": pytest.approx(training_flop(MODEL, 23, [3, 4]) / 3e6),
    }


def test_what_is_not_known_is_not_made_up(clock):
    meter = StepMeter(MODEL)
    meter.step(30, [3, 4])
    clock[0] += 1
    assert meter.figures()["mfu"] is None  # of no peak
    meter.start(1e6)
    meter.step(30, [3, 4])
    meter.step(30, None)
    clock[0] += 1
    assert meter.figures()["mfu"] is None
    meter.step(30, [3, 4])
    clock[0] += 1
    assert meter.figures()["mfu"] > 0
    with meter.apart():
        clock[0] += 5
    meter.step(30, [3, 4])
    clock[0] += 2
    assert meter.figures()["step_s"] == 2.0
