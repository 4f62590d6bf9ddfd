"""``profile: true``: a trace of a few steps, and the operations that take most of them."""

from __future__ import annotations

import logging
import os

import torch
from torch.profiler import ProfilerActivity, profile

from m4.config import TrainConfig
from m4.files import write_atomically

log = logging.getLogger(__name__)

TRACE_FILE, TABLE_FILE = "profile-trace.json", "profile-ops.txt"
STEPS_BEFORE, STEPS = 3, 3  # the first ones choose kernels and grow memory
_DEAREST = 10


class StepProfiler:
    """Traces three steps of this process after three others: call `step` after each, `close` after the last.

    Writes ``profile-trace.json`` (for chrome://tracing or ui.perfetto.dev) and ``profile-ops.txt``, the ten operations
    with the most time of their own, into the run directory. Does nothing unless ``profile`` is true, and on a rank
    that does not lead.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, leads: bool = True) -> None:
        self._config, self._device = config, device
        self._before = STEPS_BEFORE if config.profile and leads else 0
        self._left = STEPS if config.profile and leads else 0
        self._profiler: profile | None = None

    def step(self) -> None:
        """A step is done."""
        if self._profiler is not None:
            self._left -= 1
            if not self._left:
                self._write()
        elif self._before:
            self._before -= 1
            if not self._before:
                on_gpu = self._device.type == "cuda"
                activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
                self._profiler = profile(activities=activities)
                self._profiler.start()

    def close(self) -> None:
        """Training ends: write what was traced, or say that nothing was."""
        if self._profiler is not None:
            self._write()
        elif self._before:
            log.warning("profile: nothing was traced, for that takes more than %d steps", STEPS_BEFORE)

    def _write(self) -> None:
        assert self._profiler is not None
        traced, self._profiler = self._profiler, None
        traced.stop()
        folder = self._config.run_dir
        temporary = folder / f".{TRACE_FILE}.{os.getpid()}.tmp"
        by = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=by, row_limit=_DEAREST)
        try:
            traced.export_chrome_trace(str(temporary))
            temporary.replace(folder / TRACE_FILE)
            write_atomically(folder / TABLE_FILE, table.encode())
        except OSError as error:  # of no weight beside the run
            log.warning("profile: cannot be written: %s", error)
        else:
            log.info("profile: wrote %s and %s", folder / TRACE_FILE, folder / TABLE_FILE)
        finally:
            temporary.unlink(missing_ok=True)
