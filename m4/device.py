"""Devices and their memory: which one runs, in what precision, how much was taken, and giving back what is unused."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import time
from contextlib import AbstractContextManager

import torch

from m4.distributed import count_from_environment
from m4.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE_NAME = re.compile(r"auto|cpu|cuda(?::([0-9]{1,4}))?")
DEVICE_NAMES = "cpu, cuda, cuda:INDEX or auto"


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


def pick_device(name: str, key: str = "device") -> torch.device:
    """``auto`` is the GPU where there is one; a device asked for by name and absent is an error.

    Raises:
        ConfigError: naming ``key``, the configuration's or an argument's; the GPU was tried with an allocation.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = DEVICE_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{key}: expected {DEVICE_NAMES}, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key}: {name} is not there ({torch.cuda.device_count()} CUDA devices); use cpu or auto")
    try:
        device = torch.device(name)
        if device.index is not None:
            torch.cuda.set_device(device)  # kernels are launched on the current device
        torch.empty(1, device=device)
    except RuntimeError as error:
        raise ConfigError(f"{key}: {name} cannot be used: {str(error).splitlines()[0]}; use cpu") from error
    return device


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision for ``dtype: bf16``: weights, gradients and optimiser stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


def default_device() -> torch.device:
    """This process's GPU (``LOCAL_RANK`` under torchrun), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", count_from_environment("LOCAL_RANK", 0) % torch.cuda.device_count())


def default_dtype(device: torch.device) -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bf16" if device.type == "cuda" else "fp32"
