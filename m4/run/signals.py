"""Ctrl-C and SIGTERM: stop at once where nothing can break, and wait where it could; of many ranks all or none."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from m4.distributed import World


class Interrupted(BaseException):
    """A stop signal arrived. Not an Exception, so that no handler takes it for a failure."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum  # 130 for Ctrl-C, as shells report it


class StopSignals:
    """Within ``with StopSignals() as stop:`` SIGINT and SIGTERM raise `Interrupted`, except inside `deferred`.

    With several ranks, who would wait for one that stops at once, they raise in `check_together` only, on all of them.
    """

    def __init__(self, world: World | None = None) -> None:
        self._world = world or World()
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
        self._world.beat()
        if self.received is not None and self._world.size == 1:
            raise Interrupted(self.received)

    def check_together(self) -> None:
        """Raise if a signal came to any of the ranks; all of them call it after the same step."""
        self._world.beat()
        received = self._world.largest(self.received or 0)
        if received:
            raise Interrupted(received)

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
        if (
            first and not self._deferring and self._world.size == 1
        ):  # later ones must not break into the saving that the first one caused
            raise Interrupted(signum)
