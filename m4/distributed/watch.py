"""Whether all ranks of a run get on: a thread in each says so, and ends its process where another is lost.

torch waits for a rank that will never answer until a time-out of its own, whose error names nobody. Here every rank
writes a sign of life to the store that torchrun keeps: how often its watch has looked, how often its work got on, and
whether it waits for others. The first rank reads those of all, the others that of the first. So the rank that hangs is
told from those that wait for it; and one that takes long over a file, while it gets on, from one that does not.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

_FAILURE = "m4/failure"
_HEARD = "m4/heard"  # how many ranks have read of it
_BEAT = "m4/beat/{}"
_MOST_SECONDS = 1.0  # between two looks
_STORE_SECONDS = timedelta(seconds=30)  # for an answer of the store
_STATUS = 2
_DEAD_LOOKS = 5  # that a rank misses before it is called dead, once a connection broke
_NO_STORE = "what keeps the ranks together is gone, torchrun or, without it, rank 0"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    looks: int = 0  # of its watch: a process that is stopped or dead makes none
    progress: int = 0  # of its work
    waits: int = 0  # times that it began to wait for others
    waiting: bool = False
    place: str = ""  # machine and process

    def encoded(self) -> str:
        return f"{self.looks} {self.progress} {self.waits} {int(self.waiting)} {self.place}"

    @classmethod
    def decoded(cls, text: str) -> Beat:
        looks, progress, waits, waiting, place = text.split(" ", 4)
        return cls(int(looks), int(progress), int(waits), waiting == "1", place)


@dataclass
class Seen:
    """A rank as another sees it; times by the clock of the one who looks, since clocks of machines differ."""

    beat: Beat
    looked: float  # when its count of looks last changed
    moved: float  # … or its progress, or its waiting

    def update(self, beat: Beat, now: float) -> None:
        if beat.looks != self.beat.looks:
            self.looked = now
        if (beat.progress, beat.waits, beat.waiting) != (self.beat.progress, self.beat.waits, self.beat.waiting):
            self.moved = now
        self.beat = beat


def verdict(seen: dict[int, Seen], now: float, timeout: float) -> str | None:
    """Which ranks are lost, and how that shows; None where all get on.

    A rank is lost that gives no sign of life for ``timeout`` seconds, or that gets nowhere for so long while it waits
    for nobody and others wait; or, where all wait for each other, those that have come less far than the others.

    Args:
        seen: all ranks.
        now: by the clock of those times.
    """
    silent = [rank for rank, one in seen.items() if now - one.looked > timeout]
    if silent:
        return f"{_named(silent, seen)} gave no sign of life for {timeout:g} s (rank_timeout)"
    stuck = [rank for rank, one in seen.items() if now - one.moved > timeout]
    busy = [rank for rank in stuck if not seen[rank].beat.waiting]
    if busy and len(busy) < len(seen):
        return f"{_named(busy, seen)} made no progress for {timeout:g} s (rank_timeout) while others waited"
    if not busy and len(stuck) == len(seen):
        least = min(one.beat.waits for one in seen.values())
        behind = [rank for rank, one in seen.items() if one.beat.waits == least]
        if len(behind) < len(seen):
            return f"{_named(behind, seen)} fell behind and made no progress for {timeout:g} s (rank_timeout)"
        return (
            f"all ranks waited for each other for {timeout:g} s (rank_timeout): one of them hangs in a step, or the "
            "network between them fails"
        )
    return None


def _named(ranks: list[int], seen: dict[int, Seen]) -> str:
    names = ", ".join(f"{rank} ({seen[rank].beat.place or 'which never came'})" for rank in sorted(ranks)[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{' …' if len(ranks) > 8 else ''}"


def _reason(error: BaseException) -> str:
    """What torch says, without its guesses: the first sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(". This is")[0] if lines else type(error).__name__


class Watch:
    """The thread of one rank. `beat` and `waiting` are for its main thread.

    Args:
        store: torch's, that all ranks reach; it gets a connection of its own.
        timeout: seconds without progress after which a rank counts as lost.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store, self._rank, self._size = store.clone(), rank, size
        self.timeout = timeout
        self._every = min(_MOST_SECONDS, timeout / 5)
        self._place = f"{socket.gethostname()}, process {os.getpid()}"
        self._looks = self._progress = self._waits = 0
        self._waiting = 0  # how deep in `waiting`
        self._closing = False
        self._first = ""  # failure that any rank told, once this one has read of it
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def closing(self) -> None:
        """From now on ranks may leave."""
        self._closing = True

    def beat(self) -> None:
        """The work of this rank got on."""
        self._progress += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block this rank waits for others."""
        self._waits += 1
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            self._progress += 1

    def tell_failure(self, error: BaseException) -> bool:
        """Tell the others that this rank ends; False where another has told the same, or why this one ends, before."""
        told = f"{self._rank} {str(error) or type(error).__name__}"
        try:
            first = self._told(told)
        except RuntimeError:  # the store is gone with the one who kept it
            return True
        finally:
            self._stopped.set()
        if first == told:
            self._let_others_read()
            return True
        if first.partition(" ")[2] != str(error):
            self._say(first)
        return False

    def explain(self, error: BaseException) -> str:
        """Why an exchange with the others failed: which rank is gone."""
        reason = _reason(error)
        try:
            before = self._read_all()
            end = time.monotonic() + _DEAD_LOOKS * self._every
            while time.monotonic() < end:
                time.sleep(self._every / 4)
                if self._first or self._store.check([_FAILURE]):
                    return self._of_others(self._told(""))
            after = self._read_all()
        except RuntimeError:
            return self._of_others(self._first) if self._first else f"{_NO_STORE}: {reason}"
        now = time.monotonic()
        gone = {r: Seen(after[r], now, now) for r in after if r != self._rank and after[r].looks == before[r].looks}
        if gone:
            return f"{_named(list(gone), gone)} died: no sign of life for {_DEAD_LOOKS * self._every:g} s, and {reason}"
        return f"the exchange between the ranks failed, all of which still answer: {reason}"

    def _run(self) -> None:
        try:
            self._store.set_timeout(_STORE_SECONDS)
            self._tell_beat()  # at once: a rank that is lost in its first second has a name, too
            now = time.monotonic()
            watched = range(self._size) if self._rank == 0 else (0,)
            seen = {rank: Seen(Beat(), now, now) for rank in watched}
            while not self._stopped.wait(self._every):
                self._look(seen)
        except RuntimeError as error:
            if not (self._closing or self._stopped.is_set()):
                self._end(self._first or f"{self._rank} {_NO_STORE}: {_reason(error)}")

    def _look(self, seen: dict[int, Seen]) -> None:
        self._looks += 1
        self._tell_beat()
        if self._store.check([_FAILURE]):
            told = self._told("")  # at once: who keeps the store may leave
            if self._stopped.wait(2 * self._every):  # the main thread has the same error, or a better one
                return
            self._end(told)
        now = time.monotonic()
        for rank, one in seen.items():
            one.update(self._read(rank), now)
        found = None
        if self._rank == 0:
            found = verdict(seen, now, self.timeout)
        elif now - seen[0].looked > self.timeout:  # who sees not all of them cannot tell more
            found = verdict({0: seen[0]}, now, self.timeout)
        if found is not None and not self._closing:
            self._end(self._told(f"{self._rank} {found}"))

    def _tell_beat(self) -> None:
        beat = Beat(self._looks, self._progress, self._waits, self._waiting > 0, self._place)
        self._store.set(_BEAT.format(self._rank), beat.encoded())

    def _read(self, rank: int) -> Beat:
        key = _BEAT.format(rank)
        return Beat.decoded(self._store.get(key).decode()) if self._store.check([key]) else Beat()

    def _read_all(self) -> dict[int, Beat]:
        return {rank: self._read(rank) for rank in range(self._size)}

    def _told(self, text: str) -> str:
        """The first failure that any rank told: this one's ``text`` if no other was before."""
        if not self._first:
            self._first = self._store.compare_set(_FAILURE, "", text).decode()
            self._store.add(_HEARD, 1)
        return self._first

    def _let_others_read(self) -> None:
        """The first rank may keep the store: it leaves when all have read of the failure, or do not come to do so."""
        end = time.monotonic() + _DEAD_LOOKS * self._every
        with suppress(RuntimeError):
            while self._rank == 0 and self._store.add(_HEARD, 0) < self._size and time.monotonic() < end:
                time.sleep(self._every / 10)

    def _of_others(self, told: str) -> str:
        rank, _, text = told.partition(" ")
        return text if rank == str(self._rank) else f"ended with rank {rank}: {text}"

    def _say(self, told: str) -> None:
        print(f"error: rank {self._rank}: {self._of_others(told)}", file=sys.stderr, flush=True)

    def _end(self, told: str) -> NoReturn:
        """End this process at once: its main thread may be in a call that never returns."""
        self._say(told)
        self._let_others_read()
        os._exit(_STATUS)
