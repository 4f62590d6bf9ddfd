"""Throughput of a run as it goes."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from tqdm import tqdm

from m4.config import TrainConfig, format_duration
from m4.device import peak_memory
from m4.run.state import LoopState
from m4.schedule import Schedule

log = logging.getLogger(__name__)

_QUIET_SECONDS = 10.0  # between lines where there is no terminal to draw a bar on
_DAY = 86400.0


class Progress:
    """Speed since this process started: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, config: TrainConfig, schedule: Schedule, state: LoopState, device: torch.device):
        self._config, self._schedule, self._state, self._device = config, schedule, state, device
        self._start = self._last_line = time.monotonic()
        self._samples = self._valid = 0  # forward and backward passes done, valid tokens in them
        self._bar = tqdm(
            total=schedule.samples,
            initial=state.position,
            disable=None,  # draws on terminals only
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:12}|{postfix}",
        )

    def start(self) -> None:
        """Start the clock, after everything that happens only once."""
        self._start = self._last_line = time.monotonic()

    def micro_batch(self, samples: int, valid_tokens: int) -> None:
        """Count one forward and backward pass."""
        self._samples += samples
        self._valid += valid_tokens
        self._bar.update(samples)
        within = self._samples % self._schedule.samples_per_step
        if within and self._quiet_for(3 * _QUIET_SECONDS):
            log.info("step %d: %d of %d samples", self._state.step + 1, within, self._schedule.samples_per_step)

    def step(self, losses: list[float], norm: float, rate: float) -> dict[str, Any]:
        """Show a finished step and return its metrics."""
        schedule, state = self._schedule, self._state
        elapsed = time.monotonic() - self._start
        speed = self._samples / elapsed
        slots = self._config.input_tokens_range[1] + self._config.target_tokens_range[1]
        metrics: dict[str, Any] = {
            "tokens": schedule.tokens(state.position),
            "samples": state.position,
            "loss": sum(losses) / len(losses),
            "per_modality": dict(zip(self._config.modalities, losses, strict=True)),
            "lr": rate,
            "grad_norm": norm,
            "samples_per_s": speed,
            "valid_tokens_per_s": self._valid / elapsed,
            "counted_tokens_per_s": speed * schedule.tokens_per_sample,
            "padding_avoided": 1 - self._valid / (self._samples * slots),
            "memory_bytes": peak_memory(self._device),
            "seconds": state.seconds,
        }
        text = (
            f"step {state.step}/{schedule.steps}  loss {metrics['loss']:.4f}  lr {rate:.2e}  {speed:.3g} samples/s  "
            f"{metrics['valid_tokens_per_s']:,.0f} valid tok/s  {metrics['counted_tokens_per_s']:,.0f} counted tok/s  "
            f"padding avoided {metrics['padding_avoided']:.0%}  memory {metrics['memory_bytes'] / 1e9:.2f} GB  "
            f"left {duration_text((schedule.samples - state.position) / speed)}"
        )
        self._bar.set_postfix_str(text)
        if self._quiet_for(_QUIET_SECONDS) or (self._bar.disable and state.step in (1, schedule.steps)):
            log.info("%s", text)
        return metrics

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _quiet_for(self, seconds: float) -> bool:
        """Whether a line is due because there is no bar; counts it as shown."""
        now = time.monotonic()
        if not self._bar.disable or now - self._last_line < seconds:
            return False
        self._last_line = now
        return True


def duration_text(seconds: float) -> str:
    """H:MM:SS, or days, or years, whichever says it best."""
    if seconds > 2 * 365 * _DAY:
        return f"{seconds / _DAY / 365:.1f} years"
    return f"{seconds / _DAY:.1f} days" if seconds > 2 * _DAY else format_duration(seconds)
