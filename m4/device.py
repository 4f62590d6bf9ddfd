"""Devices and their memory: which one runs, in what precision, how much was taken, and giving back what is unused."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from m4.distributed import World, count_from_environment
from m4.errors import ConfigError

# Of control groups, version 2 and 1.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# What torch says of the host's memory, and of sizes beyond any; it has no class of its own for them.
_ALLOCATION = re.compile(
    r"DefaultCPUAllocator|[Ss]torage size calculation overflowed|out of memory|numel: integer mult"
)

# Of glibc's mallopt, by their numbers in malloc.h; bytes. Larger blocks than 32 MiB it never takes from its heap.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST_IN_HEAP = 2**30, 2**25

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINING_DTYPES = DTYPES | {"fp16": torch.float16}  # of a run: fp16 where a GPU has no bfloat16
DEVICE_NAME = re.compile(r"auto|cpu|cuda(?::([0-9]{1,4}))?")
DEVICE_NAMES = "cpu, cuda, cuda:INDEX or auto"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, the largest resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next request, where it otherwise gives the top of its heap back to the
    system at every step's end: the page faults of taking it anew were 3 % of a step of M4 (benchmarks/NOTES.md, "The
    rest of a CPU step"). Of this process, from here on. `HeapTrimmer` gives back what is free for long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, other C libraries need not
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)


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


def total_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this machine, of which a control group may have but a part."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _CGROUP_LIMITS:
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _ALLOCATION.search(str(error)) is not None


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Raise ConfigError with the remedy where the block runs out of memory, on the host or on a GPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"not enough memory: {reason}; {remedy}") from error


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


def device_of_rank(name: str, world: World) -> torch.device:
    """The device of one of several ranks: the GPU of its number on this machine, or the CPU.

    Raises:
        ConfigError: ``device`` names one GPU for all of them, or this machine has fewer GPUs than ranks.
    """
    if world.size == 1:
        return pick_device(name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if ":" in name:
        raise ConfigError(f"device: {name} is one GPU for {world.size} ranks; set device=cuda, a GPU each")
    there = torch.cuda.device_count()
    if world.local_size > there:
        raise ConfigError(
            f"device: {name}, but this machine has {there} CUDA devices for {world.local_size} ranks; start "
            f"{max(there, 1)} (torchrun --nproc-per-node), or set device=cpu"
        )
    return pick_device(f"cuda:{world.local_rank}")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second that a square matrix product reaches here, the best of a few; milliseconds of work."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first ones also choose a kernel and start threads
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision for ``dtype: bf16``, and for ``fp16`` on a GPU (a CPU looks at such a run in float32): weights,
    gradients and optimiser stay in float32."""
    enabled = dtype == "bf16" or (dtype == "fp16" and device.type == "cuda")
    return torch.autocast(device.type, dtype=TRAINING_DTYPES[dtype] if enabled else None, enabled=enabled)


def default_device() -> torch.device:
    """This process's GPU (``LOCAL_RANK`` under torchrun), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", count_from_environment("LOCAL_RANK", 0) % torch.cuda.device_count())


def default_dtype(device: torch.device) -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bf16" if device.type == "cuda" else "fp32"
