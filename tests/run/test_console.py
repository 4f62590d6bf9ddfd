"""What a long command shows: a bar on a terminal, lines with count, rate and time left in a log."""

import io
import logging
import threading

import pytest

from m4.config import TrainConfig
from m4.device import pick_device
from m4.run import console
from m4.run.console import ProgressDisplay, TrainingProgress, announce_estimate, duration_text, show_progress
from m4.run.state import LoopState
from m4.schedule import Schedule


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="m4")
    return caplog


def test_a_log_gets_a_line_every_ten_seconds(clock, lines):
    done = []
    for size in show_progress([96] * 5, "evaluating", 480, size=lambda size: size):
        done.append(size)
        clock[0] += 6.0
    assert done == [96] * 5
    assert lines.messages == [
        "evaluating: 192 of 480 samples, 16 samples/s, 0:00:18 left",
        "evaluating: 384 of 480 samples, 16 samples/s, 6 s left",
    ]


def test_a_long_wait_for_a_figure_shows_that_the_work_goes_on(clock, lines, monkeypatch):
    outer, display = ProgressDisplay(10), ProgressDisplay(4)
    display.show("evaluating: 4 samples")
    for seconds in (29.0, 1.0, 29.0, 1.0):
        clock[0] += seconds
        display.say_it_goes_on()
        outer.say_it_goes_on()  # another is shown within it
    assert lines.messages == [
        "evaluating: 4 samples; at work on the next for 0:00:30",
        "evaluating: 4 samples; at work on the next for 0:01:00",
    ]
    display.close()
    outer.say_it_goes_on()
    assert lines.messages[2:] == ["at work; at work on the next for 0:01:00"]
    outer.close()
    monkeypatch.setattr(console.sys, "stderr", Terminal())
    display = ProgressDisplay(4)
    display.show("evaluating: 4 samples")
    clock[0] += 40.0
    display.say_it_goes_on()
    assert "at work on the next for 0:00:40" in console.sys.stderr.getvalue()
    display.close()


def test_a_thread_watches_and_ends_with_the_display(monkeypatch):
    monkeypatch.setattr(console, "_WATCH_SECONDS", 0.01)
    said = threading.Event()
    monkeypatch.setattr(ProgressDisplay, "say_it_goes_on", lambda self: said.set())
    before = threading.active_count()
    display = ProgressDisplay(4)
    assert said.wait(10)
    display.close()
    for thread in threading.enumerate():
        if thread.name == "progress" and thread is not threading.current_thread():
            thread.join(10)
    assert threading.active_count() <= before


def test_a_short_piece_of_work_says_nothing(clock, lines):
    assert list(show_progress(range(3), "evaluating", 3)) == [0, 1, 2]
    assert lines.messages == []


def test_a_terminal_gets_a_bar(monkeypatch, lines):
    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stderr", terminal)
    seen = []
    for _ in show_progress(range(4), "evaluating", 4, unit="videos"):
        seen.append(terminal.getvalue())
    assert "evaluating: 4 videos" in seen[0]  # before the first is done
    assert lines.messages == []


def test_the_bar_ends_with_the_work_that_fails(monkeypatch):
    closed = []
    monkeypatch.setattr(ProgressDisplay, "close", lambda self: closed.append(True))

    def work():
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(show_progress(work(), "evaluating", 2))
    assert closed == [True]


def _progress(config=None, **state):
    config = config or TrainConfig(batch_size=96, global_batch_size=480)
    return TrainingProgress(config, Schedule.of(config, 1), LoopState(**state), pick_device("cpu"))


def test_a_long_step_shows_how_far_it_is(clock, lines):
    """The first step of M4-config.yaml takes ten minutes on a CPU."""
    progress = _progress()
    progress.start(peak=1e12)
    for _ in range(2):
        clock[0] += 120.0
        progress.micro_batch(96, 96 * 256)
    assert [line.split(", 1")[0] for line in lines.messages] == [
        "step 1/24415: 96 of 480 samples, 0.8 samples/s, 0:08:00 left in this step",
        "step 1/24415: 192 of 480 samples, 0.8 samples/s, 0:06:00 left in this step",
    ]
    assert "169.5 days in all" in lines.messages[1]


def test_a_step_after_a_resume_shows_where_the_run_is(clock, lines):
    progress = _progress(step=24414, position=24414 * 480)
    progress.start(peak=1e12)
    for _ in range(5):
        clock[0] += 12.0
        progress.micro_batch(96, 96 * 256)
    assert "step 24415/24415: 384 of 480 samples, 8 samples/s, 0:00:12 left in this step, 0:00:12 in all" in (
        lines.messages
    )


def test_without_a_run_nothing_is_shown(clock, lines):
    """A test or a benchmark takes steps of the trainer, and draws no bar."""
    progress = _progress(step=1, position=480)
    for _ in range(5):
        clock[0] += 60.0
        progress.micro_batch(96, 96 * 256)
    assert progress.step([1.0] * 4, [0.5] * 4, 1.0, 0.1)["samples_per_s"] == pytest.approx(1.6)
    assert lines.messages == []


def test_the_estimate_names_the_step(lines):
    schedule = Schedule.of(TrainConfig(batch_size=96, global_batch_size=480), 1)
    announce_estimate(schedule, pick_device("cpu"), lambda samples: 1.25 * samples, 1.25)
    assert "so a step (480 samples) takes about 0:10:00, the whole recipe (11,719,200 samples) about 169.5 days" in (
        lines.messages
    )
    assert any("M4-tiny.yaml" in message for message in lines.messages)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (0.04, "0.04 s"), (9.6, "9.6 s"), (52485, "14:34:45"), (3e5, "3.5 days"), (7.9e7, "2.5 years")],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text
