"""A bar for work that takes long only where there is much data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from m4.bars import tqdm

T = TypeVar("T")

_QUIET = 2.0  # seconds: work that is done sooner says nothing
_wanted: ContextVar[bool] = ContextVar("bars of m4.data are wanted", default=True)


def shown(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """Hand on the items; from the third second on a bar on a terminal, a line every ten seconds elsewhere."""
    if not _wanted.get():
        yield from items
        return
    often = 0.1 if sys.stderr.isatty() else 10.0
    yield from tqdm(items, desc=what, unit=unit, delay=_QUIET, mininterval=often, leave=False, file=sys.stderr)


@contextmanager
def bars(wanted: bool) -> Iterator[None]:
    """Within it `shown` shows bars, or none, whatever is between here and there."""
    before = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(before)
