"""The ranks of a run as torchrun started them, and the few things that they say to each other outside a step."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from m4.distributed.watch import Watch
from m4.errors import ConfigError, RankError

T = TypeVar("T")

# Of torch's own waiting on a CPU, which cannot tell a rank that hangs from one that writes a large file: `Watch` can.
_LONG = timedelta(days=30)
# How gloo words it where a rank is gone; it has no class of its own for that.
_CONNECTION = re.compile(r"gloo|connection (closed|reset|refused)|connection was|broken pipe|timed out", re.IGNORECASE)
_LAST_SECONDS = 15  # for a process that has failed to come to its end


def leave(status: int) -> NoReturn:
    """End this rank with a status, once all is written and the ranks have parted: torch's threads of an exchange may
    outlive it, and then abort a process that ends as usual."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass(frozen=True)
class Link:
    """What connects a rank with the others."""

    watch: Watch
    control: Any  # the group, on CPUs, of what is not a tensor of a step


@dataclass(frozen=True)
class World:
    """The ranks of this run; alone, nothing is exchanged and every method is free."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks on this machine
    local_size: int = 1
    link: Link | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun announced: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; one process where it did not.

        Raises:
            ConfigError: naming the variable that makes no sense.
        """
        size, local_size = (max(1, count_from_environment(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if size == 1:
            return cls()
        ranks = {}
        for name, most in (("RANK", size), ("LOCAL_RANK", local_size)):
            if name not in os.environ and name == "RANK":
                raise ConfigError(f"RANK: not set, with WORLD_SIZE={size}; start the command with torchrun")
            ranks[name] = count_from_environment(name, 0)
            if ranks[name] >= most:
                raise ConfigError(f"{name}: expected a rank below {most}, got {ranks[name]}; start it with torchrun")
        return cls(ranks["RANK"], size, ranks["LOCAL_RANK"], local_size)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that logs and writes."""
        return self.rank == 0

    @contextmanager
    def joined(self, timeout: float, device_type: str) -> Iterator[World]:
        """Connect with the other ranks; what ends one of them within the block ends them all.

        Args:
            timeout: seconds (the key ``rank_timeout``) without progress of a rank after which it counts as hung.
            device_type: cuda exchanges gradients by NCCL, cpu by gloo.
        Raises:
            RankError: a rank did not come, died or hung; which one, and after how long.
        """
        if self.size == 1:
            yield self
            return
        if not self.leads:
            _be_silent()
        store = self._meet(timeout)
        watch = Watch(store, self.rank, self.size, timeout)
        watch.start()
        try:
            linked = self._linked(watch, store, timeout, device_type)
            yield linked
            watch.closing()
            linked.largest(0)  # nobody leaves while another still needs it
        except BaseException as error:
            # Whatever torch's destructors wait for: this process ends.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_LAST_SECONDS)
            if watch.tell_failure(error):
                raise
            raise SystemExit(2) from None  # another rank has said why
        watch.stop()
        dist.destroy_process_group()

    def _meet(self, timeout: float) -> dist.Store:
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise RankError(
                f"rank {self.rank} did not meet all {self.size} ranks within {timeout:g} s (rank_timeout): {reason}; "
                "start the command with torchrun, on every machine"
            ) from error
        return store

    def _linked(self, watch: Watch, store: dist.Store, timeout: float, device_type: str) -> World:
        on_gpu = device_type == "cuda"
        patience = timedelta(seconds=2 * timeout + 60) if on_gpu else _LONG
        world = replace(self, link=Link(watch, None))
        with world.waiting():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=dist.PrefixStore("m4/group", store),
                rank=self.rank,
                world_size=self.size,
                timeout=patience,
            )
            control = dist.new_group(backend="gloo", timeout=_LONG) if on_gpu else dist.group.WORLD
        return replace(self, link=Link(watch, control))

    def beat(self) -> None:
        """Say that this rank gets on; called at every micro-batch and every batch of an evaluation."""
        if self.link is not None:
            self.link.watch.beat()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block this rank waits for others, and is not the one that hangs.

        Raises:
            RankError: they are gone.
        """
        if self.link is None:
            yield
            return
        try:
            with self.link.watch.waiting():
                yield
        except RuntimeError as error:
            if not _lost_connection(error):
                raise
            raise RankError(self.link.watch.explain(error)) from error

    def sum_of(self, tensor: Tensor) -> Any:
        """Begin to replace ``tensor`` by its sum over the ranks, in place; ``.wait()`` on the result within `waiting`.

        The sum has the same bits on every rank. All ranks must begin their sums in the same order."""
        return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=True)

    def largest(self, value: int) -> int:
        """The largest of the values that the ranks give."""
        if self.link is None:
            return value
        with self.waiting():
            held = torch.tensor(value)
            dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self.link.control)
        return int(held)

    def gather(self, value: T) -> list[T]:
        """What every rank gives, in the order of the ranks."""
        if self.link is None:
            return [value]
        found: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(found, value, group=self.link.control)
        return found

    def first(self, found: str | None) -> str | None:
        """What the first of the ranks has found that found anything, the same on all of them; else None."""
        return next((text for text in self.gather(found) if text is not None), None)

    def told(self, items: Iterable[T]) -> Iterator[T]:
        """The items that the first rank has; those of the others are not looked at."""
        if self.link is None:
            yield from items
            return
        left, none = iter(items), "no more"
        while True:
            held: list[Any] = [(next(left, none),) if self.leads else None]
            with self.waiting():
                dist.broadcast_object_list(held, src=0, group=self.link.control)
            if held[0][0] == none:
                return
            yield held[0][0]

    def one_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, called on the first rank before it is called on the others: it may prepare files."""
        if self.leads:
            made = make()
            self.largest(0)
            return made
        self.largest(0)
        return make()

    def by_first(self, act: Callable[[], Any], *failures: type[Exception]) -> Exception | None:
        """Let the first rank act; which of ``failures`` kept it from that, or None, the same on all ranks."""
        failure: Exception | None = None
        if self.leads:
            try:
                act()
            except failures as error:
                failure = error
        told = self.gather(failure)[0]
        return failure or told

    def must_agree(self, what: dict[str, Any]) -> None:
        """Raise RankError naming the first of the values (by name) that differs between ranks."""
        for rank, other in enumerate(self.gather(what)):
            for name, value in what.items():
                if other[name] != value:
                    raise RankError(
                        f"{name}: {value!r} on rank {self.rank}, {other[name]!r} on rank {rank}; every rank needs the "
                        "same command, configuration and data"
                    )


_silent = False


def speaks() -> bool:
    """Whether this process shows how its work goes on; of the ranks of a run one does."""
    return not _silent


def _be_silent() -> None:
    global _silent
    _silent = True
    for ours in ("m4", "m4kernels"):
        logging.getLogger(ours).setLevel(logging.ERROR)


def _lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _CONNECTION.search(str(error)) is not None


def count_from_environment(name: str, default: int) -> int:
    """A variable of the environment that holds a count or a rank.

    Raises:
        ConfigError: it is set to anything but digits.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"{name}: expected a number, got {text!r}; unset it, or start the command with torchrun")
    return int(text)
