"""Memory of the training process: how much it took, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import resource
import sys
import time

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, the largest resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class HeapTrimmer:
    """Returns freed memory to the system now and then.

    Packed batches differ in length from step to step, so glibc's heap is cut into blocks that fit no later request
    and grows by 1.5 MB a step of even a small model; a trim every few seconds costs milliseconds and keeps it flat.
    """

    def __init__(self, every_seconds: float = 10.0):
        self._every = every_seconds
        self._last = time.monotonic()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries need not

    def step(self) -> None:
        """Trim if it is time."""
        if self._trim is not None and time.monotonic() - self._last > self._every:
            self._trim(0)
            self._last = time.monotonic()
