"""What every bench_<op>.py has: a table of cases and providers, and the two tests over it.

A bench file sets `SUITE` and imports `test_time` and `test_guard`; conftest.py parametrises them.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import guard
from benchmarks.measure import Run, Work, warm_up
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
        full: only with `-m full`.
    """

    build: Callable[[], Any]
    work: Callable[[Any], Work]
    without: tuple[str, ...] = ()
    full: bool = False


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
    """

    op: str
    cases: Mapping[str, Case]
    providers: Mapping[str, Callable[[Any], Run]]
    guards: tuple[tuple[str, str], ...] = ()
    long: tuple[str, ...] = ()

    def run(self, case: str, provider: str) -> Run:
        return self.providers[provider](_inputs(self.cases[case]))


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> Any:
    """The case's inputs; the last case's are kept, since tests come case by case."""
    return case.build()


def test_time(suite: Suite, case: str, provider: str, benchmark: Any, session: Session) -> None:
    """Time, rate, share of the floor and peak extra memory of one provider."""
    run = suite.run(case, provider)
    once, repeat = warm_up(run)
    rounds = min(200, max(2, int(SECONDS / (once * repeat))))
    benchmark.group = f"{suite.op}, {case}"
    benchmark.pedantic(run, rounds=rounds, iterations=repeat, warmup_rounds=0)
    if benchmark.stats is None:  # --benchmark-disable
        return
    work = suite.cases[case].work(_inputs(suite.cases[case]))
    record = Record.of(suite.op, case, provider, benchmark.stats.stats.median, rounds, work, peak_extra_memory(run))
    benchmark.extra_info.update(rate=record.rate, share_of_floor=record.share_of_floor, work=work.formula)
    session.records.append(record)


def test_guard(
    suite: Suite, case: str, pair: tuple[str, str], session: Session, request: pytest.FixtureRequest
) -> None:
    """The kernel's speed-up over a baseline is not below its floor."""
    kernel, baseline = pair
    update = request.config.getoption("--update-floors")
    name = f"{suite.op}/{case}/{kernel} over {baseline}"
    session.speedups[name] = guard.check(name, suite.run(case, kernel), suite.run(case, baseline), update=update)
