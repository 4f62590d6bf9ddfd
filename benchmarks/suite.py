"""What every bench_<op>.py has: a table of cases and providers, and the two tests over it.

A bench file sets `SUITE` and imports `test_time` and `test_guard`; conftest.py parametrises them.
"""

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks import guard
from benchmarks.device import DEVICE, ON_GPU, Unavailable, moved
from benchmarks.measure import Run, Work, gpu_median, gpu_peak_memory, timed, warm_up
from benchmarks.results import Record, Session
from m4kernels.testing import peak_extra_memory

SECONDS = 0.5  # of measuring a provider


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Args:
        build: makes the inputs.
        work: what one run over them has to do.
        without: providers that cannot do this work.
        full: only with `-m full`, on a CPU.
        gpu: runs on a GPU.
        cpu: runs on a CPU.
    """

    build: Callable[[], Any]
    work: Callable[[Any], Work]
    without: tuple[str, ...] = ()
    full: bool = False
    gpu: bool = False
    cpu: bool = True


@dataclass(frozen=True)
class Suite:
    """One op.

    Args:
        op: its name.
        cases: by name.
        providers: by name: takes the inputs, returns a run. All do the same work and are tested elsewhere. A run leaves
            nothing behind (no gradients), so that the next one's memory is its own.
        long: providers only with `-m full`.
        guards: (kernel, baseline): pairs of providers whose speed-up has a floor.
        dtype: of the floating inputs on a GPU.
        clock: on a GPU, too, time by the clock, so that the host's part counts; memory is then all that was reserved,
            model and optimiser included.
    """

    op: str
    cases: Mapping[str, Case]
    providers: Mapping[str, Callable[[Any], Run]]
    guards: tuple[tuple[str, str], ...] = ()
    long: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    clock: bool = False

    def run(self, case: str, provider: str) -> Run:
        """The run of a provider; a test that asks for one that this machine lacks is skipped."""
        try:
            return self.prepared(case, provider)
        except Unavailable as reason:
            pytest.skip(str(reason))

    def prepared(self, case: str, provider: str) -> Run:
        """The run of a provider. Raises Unavailable where this machine lacks it."""
        if ON_GPU:  # what earlier runs held, graphs and models, is this one's
            gc.collect()
            torch.cuda.empty_cache()
        return self.providers[provider](_inputs(self.cases[case], self.dtype))


@functools.lru_cache(maxsize=1)
def _inputs(case: Case, dtype: torch.dtype | None) -> Any:
    """The case's inputs; the last case's are kept, since tests come case by case."""
    inputs = case.build()
    return moved(inputs, DEVICE, dtype) if ON_GPU else inputs


def test_time(suite: Suite, case: str, provider: str, session: Session, request: pytest.FixtureRequest) -> None:
    """Time, rate, share of the floor and peak extra memory of one provider."""
    if ON_GPU:
        _time_on_gpu(suite, case, provider, session)
        return
    run = suite.run(case, provider)
    benchmark = request.getfixturevalue("benchmark")
    once, repeat = warm_up(run)
    rounds = min(200, max(2, int(SECONDS / (once * repeat))))
    benchmark.group = f"{suite.op}, {case}"
    benchmark.pedantic(run, rounds=rounds, iterations=repeat, warmup_rounds=0)
    if benchmark.stats is None:  # --benchmark-disable
        return
    record = _record(suite, case, provider, benchmark.stats.stats.median, rounds, peak_extra_memory(run))
    benchmark.extra_info.update(rate=record.rate, share_of_floor=record.share_of_floor, work=record.work)
    session.add(record)


def _time_on_gpu(suite: Suite, case: str, provider: str, session: Session) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    session.add(measured(suite, case, provider))


def measured(suite: Suite, case: str, provider: str, seconds: float = SECONDS) -> Record:
    """What one provider takes on one case, without pytest-benchmark: on a GPU, and where a GPU's session is rehearsed.

    Raises:
        Unavailable: this machine lacks the provider.
    """
    if not ON_GPU:
        run = suite.prepared(case, provider)
        return _record(suite, case, provider, min(timed(run) for _ in range(2)), 2, peak_extra_memory(run))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    run = suite.prepared(case, provider)
    median, rounds = gpu_median(run, seconds=seconds, clock=suite.clock)
    # A graph's tensors are reserved for it and never allocated again, so of a whole step that is what counts.
    peak = torch.cuda.max_memory_reserved() - before if suite.clock else gpu_peak_memory(run)
    return _record(suite, case, provider, median, rounds, peak)


def _record(suite: Suite, case: str, provider: str, seconds: float, rounds: int, peak: int) -> Record:
    work = suite.cases[case].work(_inputs(suite.cases[case], suite.dtype))
    return Record.of(suite.op, case, provider, seconds, rounds, work, peak)


def test_guard(
    suite: Suite, case: str, pair: tuple[str, str], session: Session, request: pytest.FixtureRequest
) -> None:
    """The kernel's speed-up over a baseline is not below its floor."""
    kernel, baseline = pair
    update = request.config.getoption("--update-floors")
    name = f"{suite.op}/{case}/{kernel} over {baseline}"
    runs = suite.run(case, kernel), suite.run(case, baseline)
    speedup = guard.check(name, *runs, update=update, clock=suite.clock or not ON_GPU, seconds=0.3 if ON_GPU else 1.0)
    session.add_speedup(name, speedup)
