"""What a long command shows: a bar on a terminal, a line now and then in a log; and what a run is, before it starts."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from m4.bars import tqdm
from m4.config import TrainConfig, format_duration
from m4.device import peak_memory
from m4.distributed import speaks
from m4.run.meter import StepMeter
from m4.run.state import LoopState
from m4.schedule import Schedule

log = logging.getLogger(__name__)

T = TypeVar("T")

QUIET_SECONDS = 10.0  # between lines where there is no terminal to draw a bar on
SILENT_SECONDS = 30.0  # after so long without a figure, a line says that the work goes on
_REDRAW_SECONDS = 0.1
_WATCH_SECONDS = 5.0
_DAY = 86400.0
_RUN_OF_MINUTES = (
    "model.dim=96 model.head_dim=32 model.enc_depth=2 model.dec_depth=2 batch_size=8 global_batch_size=8 lr=0.006 "
    "total_tokens=1 token_warmup=0.04 eval_freq=0.25 eval_samples=48 run_name=small"
)


class ProgressDisplay:
    """How far a long piece of work is: a bar on a terminal; elsewhere a line, at most one in ten seconds.

    A thread says that the work goes on where a unit of it, such as a batch of a large model on a CPU, takes minutes.

    Args:
        total, done: units of the whole, and those done before.
        keep: leave the bar on the screen at the end.
    """

    def __init__(self, total: int, done: int = 0, *, keep: bool = True):
        self._bar = tqdm(
            total=total,
            initial=done,
            file=sys.stderr,
            disable=None if speaks() else True,  # draws on terminals only, of several ranks the first
            dynamic_ncols=True,
            leave=keep,
            bar_format="{percentage:3.0f}%|{bar:12}|{postfix}",
        )
        self.draws = not self._bar.disable  # whether there is a terminal to draw on
        self._last = -math.inf if self.draws else time.monotonic()
        self._text, self._told = "", time.monotonic()  # what was shown last, or would have been; and when
        self._spoke = self._told  # when anything was last written, that the work goes on included
        self._closed = threading.Event()
        _open.append(self)
        threading.Thread(target=self._watch, name="progress", daemon=True).start()

    def show(self, text: str, advance: int = 0, *, at_once: bool = False) -> None:
        """Move on by so many units and put the text beside the bar, or on a line; `at_once` or when it is time."""
        self._bar.n += advance
        now = time.monotonic()
        self._text, self._told = text, now
        due = at_once or now - self._last >= (_REDRAW_SECONDS if self.draws else QUIET_SECONDS)
        if due:
            self._last = self._spoke = now
        if self.draws:
            self._bar.set_postfix_str(text, refresh=due)
        elif due:
            log.info("%s", text)

    def advance(self, units: int) -> None:
        """Move on and leave the text as it is."""
        self._bar.update(units)

    def close(self) -> None:
        """Leave the bar as it stands, or take it away."""
        self._closed.set()
        if self in _open:
            _open.remove(self)
        self._bar.close()

    def say_it_goes_on(self) -> None:
        """Write how long nothing new was shown, if that is long and no piece of work within this one is shown."""
        now = time.monotonic()
        if now - max(self._told, self._spoke) < SILENT_SECONDS or self is not _open[-1]:
            return
        self._spoke = now
        text = f"{self._text or 'at work'}; at work on the next for {duration_text(now - self._told)}"
        if self.draws:
            self._bar.set_postfix_str(text)
        else:
            log.info("%s", text)

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_SECONDS):
            self.say_it_goes_on()


_open: list[ProgressDisplay] = []  # the innermost last


def show_progress(
    items: Iterable[T], what: str, total: int, *, size: Callable[[T], int] = lambda _: 1, unit: str = "samples"
) -> Iterator[T]:
    """Hand on the items of a long piece of work, and show their count, rate and the time left.

    Args:
        items: they count as done when the next is asked for.
        what: begins the line, for example "evaluating on test".
        total: units in all items together.
        size: units in an item.
        unit: what is counted.
    """
    display = ProgressDisplay(total, keep=False)
    start, done = time.monotonic(), 0
    display.show(f"{what}: {total:,} {unit}")
    try:
        for item in items:
            yield item
            done += size(item)
            rate = done / max(time.monotonic() - start, 1e-9)
            left = duration_text((total - done) / rate) if rate else "?"
            display.show(f"{what}: {done:,} of {total:,} {unit}, {rate:.3g} {unit}/s, {left} left", size(item))
    finally:
        display.close()


class TrainingProgress:
    """Speed since this process started training, beside the figures of the last step."""

    def __init__(self, config: TrainConfig, schedule: Schedule, state: LoopState, device: torch.device):
        self._config, self._schedule, self._state, self._device = config, schedule, state, device
        self._samples = self._valid = 0  # forward and backward passes done, valid tokens in them
        self._valid_before = 0  # this step
        self.meter = StepMeter(config.model_config())
        self._display: ProgressDisplay | None = None
        self._start = time.monotonic()

    def start(self, peak: float) -> None:
        """Draw the bar and start the clock, after everything that happens only once.

        peak: FLOP a second of all devices.
        """
        self.meter.start(peak)
        self._display = ProgressDisplay(self._schedule.samples, self._state.position)
        self._display.show(f"step {self._state.step + 1}/{self._schedule.steps}")
        self._start = time.monotonic()

    def micro_batch(self, samples: int, valid_tokens: int) -> None:
        """Count one forward and backward pass."""
        self._samples += samples
        self._valid += valid_tokens
        if self._display is None:
            return
        schedule, step = self._schedule, self._state.step
        within = self._samples % schedule.samples_per_step
        # On a terminal the figures of the last step stay in sight, once there are some.
        if within and (step == 0 or not self._display.draws):
            speed = self._samples / (time.monotonic() - self._start)
            left = duration_text((schedule.samples_per_step - within) / speed)
            self._display.show(
                f"step {step + 1}/{schedule.steps}: {within} of {schedule.samples_per_step} samples, "
                f"{speed:.3g} samples/s, {left} left in this step, {self._left(within, speed)} in all",
                samples,
            )
        else:
            self._display.advance(samples)

    def launched(self, targets: Sequence[int] | None) -> None:
        """Count a step, whose figures may be known later; targets: of each modality, if known."""
        self.meter.step(self._valid - self._valid_before, targets)
        self._valid_before = self._valid

    def step(
        self, losses: list[float | None], accuracies: list[float | None], norm: float, rate: float
    ) -> dict[str, Any]:
        """Show a finished step and return its metrics.

        losses, accuracies: of each modality, None without a target; such a loss counts as 0 in the mean. In the metrics
            of a step that was skipped null stands for what is not finite.
        """
        schedule, state = self._schedule, self._state
        elapsed = time.monotonic() - self._start
        speed = self._samples / elapsed
        slots = self._config.input_tokens_range[1] + self._config.target_tokens_range[1]
        metrics: dict[str, Any] = {
            "tokens": schedule.tokens(state.position),
            "samples": state.position,
            "loss": finite_or_none(sum(loss or 0.0 for loss in losses) / len(losses)),
            "per_modality": dict(zip(self._config.modalities, map(finite_or_none, losses), strict=True)),
            "accuracy": dict(zip(self._config.modalities, map(finite_or_none, accuracies), strict=True)),
            "lr": rate,
            "grad_norm": finite_or_none(norm),
            "skipped_steps": state.skipped_steps,
            "samples_per_s": speed,
            "valid_tokens_per_s": self._valid / elapsed,
            "counted_tokens_per_s": speed * schedule.tokens_per_sample,
            "padding_avoided": 1 - self._valid / (self._samples * slots),
            "memory_bytes": peak_memory(self._device),
            "seconds": state.seconds,
        }
        if self._display is not None:
            loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
            text = (
                f"step {state.step}/{schedule.steps}  loss {loss}  lr {rate:.2e}  {speed:.3g} samples/s"
                f"  {metrics['valid_tokens_per_s']:,.0f} valid tok/s  {metrics['counted_tokens_per_s']:,.0f} counted "
                f"tok/s  padding avoided {metrics['padding_avoided']:.0%}  memory {metrics['memory_bytes'] / 1e9:.2f} "
                f"GB  left {self._left(0, speed)}"
            )
            self._display.show(text, at_once=not self._display.draws and state.step in (1, schedule.steps))
        return metrics

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._display is not None:
            self._display.close()

    def _left(self, within: int, speed: float) -> str:
        """Time for the rest of the run, of whose current step so many samples are done."""
        return duration_text((self._schedule.samples - self._state.position - within) / speed)


def announce(
    config: TrainConfig, schedule: Schedule, device: torch.device, *, parameters: int, samples: tuple, ranks: int = 1
) -> None:
    """Say what will run.

    Args:
        parameters: of the model.
        samples: (training, evaluation) samples at hand.
        ranks: that train together.
    """
    log.info(
        "%s: %s parameters on %s, %s, kernels %s",
        config.run_dir,
        f"{parameters:,}",
        device,
        config.dtype,
        config.kernels,
    )
    log.info("data: %s training and %s evaluation samples", *(f"{number:,}" for number in samples))
    if ranks > 1:
        log.info("%d ranks, %s, %s each", ranks, config.parallel, "a GPU" if device.type == "cuda" else "a process")
    log.info(
        "batch: %d samples x %d accumulated%s = %d samples a step (global_batch_size %d)",
        config.batch_size,
        schedule.accumulation,
        f" x {ranks} ranks" if ranks > 1 else "",
        schedule.samples_per_step,
        config.global_batch_size,
    )
    log.info(
        "recipe: %g M counted tokens at %d a sample: %s samples in %s steps",
        config.total_tokens,
        schedule.tokens_per_sample,
        f"{config.total_samples:,}",
        f"{schedule.steps:,}",
    )


def announce_estimate(
    schedule: Schedule, device: torch.device, seconds_of: Callable[[int], float], per_sample: float
) -> None:
    """Say how long a step and the whole recipe will take.

    Args:
        seconds_of: time of forward and backward over a number of samples.
        per_sample: seconds of one of many.
    """
    whole = seconds_of(schedule.samples)
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    log.info("smoke test passed; forward and backward take about %.3g s a sample here (%s)", per_sample, where)
    log.info(
        "so a step (%s samples) takes about %s, the whole recipe (%s samples) about %s",
        f"{schedule.samples_per_step:,}",
        duration_text(seconds_of(schedule.samples_per_step)),
        f"{schedule.samples:,}",
        duration_text(whole),
    )
    if whole > _DAY and device.type == "cpu":
        log.warning("that is no run for a CPU. For a run of minutes: python -m m4.train --config M4-tiny.yaml")
        log.warning("or with this configuration add: %s", _RUN_OF_MINUTES)


def finite_or_none(value: float | None) -> float | None:
    """As JSON has it."""
    return value if value is not None and math.isfinite(value) else None


def duration_text(seconds: float) -> str:
    """H:MM:SS, or days, or years, or a fraction of a second, whichever says it best."""
    if seconds > 2 * 365 * _DAY:
        return f"{seconds / _DAY / 365:.1f} years"
    if 0 < seconds < 10:
        return f"{seconds:.2g} s"
    return f"{seconds / _DAY:.1f} days" if seconds > 2 * _DAY else format_duration(seconds)
