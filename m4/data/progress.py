"""A bar for work that takes long only where there is much data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from m4.bars import tqdm

T = TypeVar("T")

_QUIET = 2.0  # seconds: work that is done sooner says nothing


def shown(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """Hand on the items; from the third second on a bar on a terminal, a line every ten seconds elsewhere."""
    often = 0.1 if sys.stderr.isatty() else 10.0
    yield from tqdm(items, desc=what, unit=unit, delay=_QUIET, mininterval=often, leave=False, file=sys.stderr)
