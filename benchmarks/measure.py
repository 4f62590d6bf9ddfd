"""How things are timed: alternately in one process, by medians, beside what this machine can do at best."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """What one run has to do, whoever does it.

    Args:
        amount: bytes that must be read and written at least once, or floating-point operations.
        unit: "B" or "FLOP".
        formula: how the amount follows from the shapes.
    """

    amount: float
    unit: str
    formula: str

    def rate(self, seconds: float) -> str:
        return f"{self.amount / seconds / 1e9:.1f} {'GB/s' if self.unit == 'B' else 'GFLOP/s'}"

    def share_of_floor(self, seconds: float) -> float:
        """The time that this machine needs at its best rate, over `seconds`."""
        best = copy_bandwidth() if self.unit == "B" else product_rate()
        return self.amount / best / seconds


def timed(run: Run) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def warm_up(run: Run) -> tuple[float, int]:
    """(seconds of a run that is warm, how often to repeat it within a round so that the clock's noise does not show).

    The first run counts where it is so long that warming up cannot be much of it.
    """
    seconds = timed(run)
    if seconds < 0.5:
        seconds = timed(run)
    return seconds, max(1, int(2e-4 / max(seconds, 1e-7)))


def alternate(runs: Mapping[str, Run], *, seconds: float = 2.0, rounds: tuple[int, int] = (2, 200)) -> dict[str, float]:
    """Median seconds of each, measured in turns, so that whatever slows the machine slows all of them.

    Args:
        runs: by name.
        seconds: measure for about this long,
        rounds: but at least and at most this often.
    """
    repeat = {name: warm_up(run)[1] for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(repeat[name]):
                run()
            times[name].append((time.perf_counter() - begin) / repeat[name])
    return {name: statistics.median(values) for name, values in times.items()}


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of copying 256 MiB with torch's threads; the best of a few."""
    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(5))


@functools.cache
def product_rate() -> float:
    """FLOP a second of the library's 2048 x 2048 x 2048 float32 matrix product; the best of a few."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    torch.mm(a, b)
    return 2 * 2048**3 / min(timed(lambda: torch.mm(a, b)) for _ in range(5))
