"""How things are timed: alternately in one process, by medians, beside what this machine can do at best.

On a CPU by the clock. On a GPU by its own events, from an empty queue and a cold cache: 256 MiB are written, which is
more than any L2 cache, and the GPU is kept asleep until the host has issued the whole run, so that a median is what the
kernels take. Where the host's part matters (a training step, which graphs are to relieve of it) it is the clock again,
from an idle GPU to an idle GPU.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.device import DEVICE, ON_GPU
from benchmarks.peers import onednn
from m4kernels.processor import slow_bf16

Run = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """What one run has to do, whoever does it.

    Args:
        amount: bytes that must be read and written at least once, or floating-point operations.
        unit: "B" or "FLOP".
        formula: how the amount follows from the shapes.
        bytes_besides: of work in FLOP, what it must also move, which no product hides: an optimiser's step.
    """

    amount: float
    unit: str
    formula: str
    bytes_besides: float = 0.0

    def rate(self, seconds: float) -> str:
        return f"{self.amount / seconds / 1e9:.1f} {'GB/s' if self.unit == 'B' else 'GFLOP/s'}"

    def share_of_floor(self, seconds: float) -> float:
        """The time that this machine needs at its best rates, over `seconds`."""
        floor = self.amount / (copy_bandwidth() if self.unit == "B" else product_rate())
        if self.bytes_besides:
            floor += self.bytes_besides / copy_bandwidth()
        return floor / seconds


def timed(run: Run) -> float:
    """Seconds of one run by the clock."""
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class GpuTimer:
    """Seconds that runs take on the GPU itself."""

    FLUSH_BYTES = 2**28
    SLEEP_CYCLES_PER_SECOND = 2e9  # at the highest clock; at a lower one the GPU sleeps longer, which does no harm
    LONGEST_SLEEP = 0.05  # a run that takes the host longer to issue is bound by that anyway

    def __init__(self) -> None:
        self._flush = torch.empty(self.FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)

    def __call__(self, run: Run) -> float:
        """Seconds of one run. The first ones also compile and choose kernels: warm up before."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        issuing = time.perf_counter() - begin
        torch.cuda.synchronize()
        return self.once(run, issuing)

    def once(self, run: Run, issuing: float) -> float:
        """Seconds of a run that the host issues in about `issuing` seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int(min(1.5 * issuing + 2e-5, self.LONGEST_SLEEP) * self.SLEEP_CYCLES_PER_SECOND))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


@functools.cache
def gpu_timer() -> GpuTimer:
    return GpuTimer()


def gpu_median(run: Run, *, seconds: float, clock: bool, rounds: tuple[int, int] = (5, 200)) -> tuple[float, int]:
    """(median seconds, rounds) of a run on the GPU: by the clock, or by its events."""
    for _ in range(3):
        timed(run)
    measure = timed if clock else gpu_timer()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < rounds[0] or (len(times) < rounds[1] and time.perf_counter() - start < seconds):
        times.append(measure(run))
    return statistics.median(times), len(times)


def gpu_peak_memory(run: Run) -> int:
    """The most bytes that torch holds on the GPU during a run beyond those it holds before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def warm_up(run: Run) -> tuple[float, int]:
    """(seconds of a run that is warm, how often to repeat it within a round so that the clock's noise does not show).

    The first run counts where it is so long that warming up cannot be much of it.
    """
    seconds = timed(run)
    if seconds < 0.5:
        seconds = timed(run)
    return seconds, max(1, int(2e-4 / max(seconds, 1e-7)))


SECONDS_A_TURN = 2e-3  # of a run that is shorter, repeated, once untimed before


def alternate(
    runs: Mapping[str, Run], *, seconds: float = 2.0, rounds: tuple[int, int] = (2, 200), clock: bool = True
) -> dict[str, float]:
    """Median seconds of each, measured in turns, so that whatever slows the machine slows all of them.

    Args:
        runs: by name.
        seconds: measure for about this long,
        rounds: but at least and at most this often.
        clock: by the clock; else, on a GPU, by its events.
    """
    if ON_GPU:
        return _alternate_on_gpu(runs, seconds, rounds, timed if clock else gpu_timer())
    repeat = {name: max(1, int(SECONDS_A_TURN / max(warm_up(run)[0], 1e-7))) for name, run in runs.items()}

    def turn(name: str) -> float:
        run = runs[name]
        if repeat[name] > 1:  # the other's turn left its data in the caches and the second thread asleep
            run()
        begin = time.perf_counter()
        for _ in range(repeat[name]):
            run()
        return (time.perf_counter() - begin) / repeat[name]

    return _in_turns(turn, runs, seconds, rounds)


def _alternate_on_gpu(
    runs: Mapping[str, Run], seconds: float, rounds: tuple[int, int], measure: Callable[[Run], float]
) -> dict[str, float]:
    for run in runs.values():
        for _ in range(3):
            timed(run)
    return _in_turns(lambda name: measure(runs[name]), runs, seconds, rounds)


def _in_turns(
    measure: Callable[[str], float], names: Iterable[str], seconds: float, rounds: tuple[int, int]
) -> dict[str, float]:
    """Median of what `measure` gives for each name, asked in turns."""
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name, measured in times.items():
            measured.append(measure(name))
    return {name: statistics.median(measured) for name, measured in times.items()}


_known: dict[str, Any] = {}


def believe(copied: float, multiplied: Mapping[str, float]) -> None:
    """Take what `copy_bandwidth` and `product_rates` give from another process of this machine, which measured it."""
    _known.update(copied=copied, multiplied=dict(multiplied))


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of copying 256 MiB with torch's threads, or 2 GiB on a GPU; the best of a
    few."""
    if "copied" in _known:
        return _known["copied"]
    if ON_GPU:
        source = torch.zeros(2**29, device=DEVICE)
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(gpu_timer()(lambda: target.copy_(source)) for _ in range(8))
    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(5))


@functools.cache
def product_rates() -> dict[str, float]:
    """FLOP a second of the matrix products at hand, by library and dtype; the best of a few, 2048 x 2048 x 2048 on a
    CPU, 8192 x 8192 x 8192 on a GPU. None of bfloat16 on a CPU without instructions for it: on one with AVX2 alone
    PyTorch's takes minutes."""
    if "multiplied" in _known:
        return _known["multiplied"]
    size, float32, bfloat16 = (8192 if ON_GPU else 2048), "PyTorch float32", "PyTorch bfloat16"
    a, b = torch.randn(size, size, device=DEVICE), torch.randn(size, size, device=DEVICE)
    runs: dict[str, Callable[[], Any]] = {
        float32: lambda: torch.mm(a, b),
    }
    if ON_GPU or slow_bf16() is None:
        runs[bfloat16] = functools.partial(torch.mm, a.bfloat16(), b.bfloat16())
    if not ON_GPU and torch.backends.mkldnn.is_available():
        runs["oneDNN float32"] = lambda: onednn.product(a, b)
    measure = gpu_timer() if ON_GPU else timed
    rates = {}
    for name, run in runs.items():
        timed(run)
        rates[name] = 2 * size**3 / min(measure(run) for _ in range(8 if ON_GPU else 5))
    return rates


def product_rate() -> float:
    """The floor's: the best of them in float32 on a CPU, in bfloat16 on a GPU."""
    dtype = "bfloat16" if ON_GPU else "float32"
    return max(rate for name, rate in product_rates().items() if name.endswith(dtype))
