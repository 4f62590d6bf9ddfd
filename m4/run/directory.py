"""The run directory: one process at a time, and the summary it ends with."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from m4.config import TrainConfig, format_duration
from m4.device import peak_memory
from m4.errors import ConfigError
from m4.files import writable_folder, write_atomically
from m4.run.console import duration_text
from m4.run.state import LoopState
from m4.schedule import Schedule

log = logging.getLogger(__name__)


@contextmanager
def only_process(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; two trainers in one would overwrite each other's checkpoints."""
    writable_folder(run_dir)
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{run_dir}: another process is training there; wait, or set run_name=NAME") from None
        yield


def write_summary(config: TrainConfig, schedule: Schedule, state: LoopState, device: torch.device) -> None:
    """Write summary.json and log how the wall clock compares with the reference."""
    speed = state.position / state.seconds if state.seconds else None
    projected = config.total_samples / speed if speed else None
    reference = config.training_seconds
    summary = {
        "run_name": config.run_name,
        "finished": state.step >= schedule.steps,
        "steps": state.step,
        "samples": state.position,
        "counted_tokens": state.position * schedule.tokens_per_sample,
        "first_evaluation": state.first_evaluation,
        "evaluation": state.evaluation,
        "evaluation_step": state.evaluated_step,
        "samples_per_s": speed,
        "counted_tokens_per_s": speed and speed * schedule.tokens_per_sample,
        "wall_clock_seconds": state.seconds,
        "whole_recipe_seconds": projected,  # total_tokens at this speed
        "training_time_seconds": reference,
        "speedup_over_training_time": reference / projected if reference and projected else None,
        "peak_memory_bytes": peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_atomically(config.run_dir / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    if projected and reference:
        log.info(
            "trained for %s; at this speed the whole recipe of this configuration takes %s, the reference took %s",
            duration_text(state.seconds),
            duration_text(projected),
            format_duration(reference),
        )
