"""Ctrl-C and SIGTERM: stop at once where nothing can break, and wait where it could."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A stop signal arrived. Not an Exception, so that no handler takes it for a failure."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum  # 130 for Ctrl-C, as shells report it


class StopSignals:
    """Within ``with StopSignals() as stop:`` SIGINT and SIGTERM raise `Interrupted`, except inside `deferred`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raise if a signal came; also one whose exception was lost in a callback of C code."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish; a signal that comes meanwhile is remembered for the next `check`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, signum: int, _: FrameType | None) -> None:
        first = self.received is None
        self.received = signum
        if first and not self._deferring:  # later ones must not break into the saving that the first one caused
            raise Interrupted(signum)
