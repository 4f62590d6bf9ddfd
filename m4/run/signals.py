"""Ctrl-C, SIGTERM and SIGUSR1: stop at once where nothing can break, and wait where it could; of ranks all or none."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from m4.distributed import World

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: as Slurm is asked to announce a time limit
# A terminal and a launcher may both hand on one Ctrl-C; a later one is another.
_ONE_KEYPRESS_SECONDS = 0.5


class Interrupted(BaseException):
    """A stop signal arrived. Not an Exception, so that no handler takes it for a failure."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum  # 130 for Ctrl-C, as shells report it


class StopSignals:
    """Within ``with StopSignals() as stop:`` a stop signal raises `Interrupted`, except inside `deferred`.

    Later ones are ignored, for they must not break into the saving that the first one caused; but a second Ctrl-C
    leaves at once, even out of a long call of C code: a checkpoint that is being written is a temporary until it is
    whole, and no other file is touched.

    With several ranks, who would wait for one that stops at once, they raise in `check_together` only, on all of them.
    """

    def __init__(self, world: World | None = None) -> None:
        self._world = world or World()
        self.received: int | None = None
        self._deferring = 0
        self._previous: dict[int, Any] = {}
        self._previous_wakeup = -1
        self._pipe = (-1, -1)
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # Python's own handlers wait for C code to return; what the kernel writes here a thread can read meanwhile.
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self._watcher.start()
        for signum in STOP_SIGNALS:
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._pipe[1])  # the end of what the watcher reads
        assert self._watcher is not None
        self._watcher.join()
        os.close(self._pipe[0])

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
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1

    def _handle(self, signum: int, _: FrameType | None) -> None:
        first = self.received is None
        self.received = signum if first else self.received
        if first and not self._deferring and self._world.size == 1:
            raise Interrupted(signum)

    def _watch(self) -> None:
        first: float | None = None
        while arrived := os.read(self._pipe[0], 64):
            for signum in arrived:
                now = time.monotonic()
                if signum not in STOP_SIGNALS:
                    continue
                if first is None:
                    first = now
                    if self._deferring or self._world.size > 1:
                        name = signal.Signals(signum).name
                        log.info("%s: finishing the step, then saving; Ctrl-C (again) leaves at once", name)
                elif signum == signal.SIGINT and now - first > _ONE_KEYPRESS_SECONDS:
                    os.write(2, b"\nleaving at once, without saving; what was saved is whole\n")
                    os._exit(128 + signum)
