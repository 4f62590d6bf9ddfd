"""Memory that kernels on the CPU write to and forget, kept between calls: fresh memory costs 0.45 ms a MiB."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_kept: list[Tensor] = []  # one at most
_lock = threading.Lock()


@contextmanager
def workspace(floats: int) -> Iterator[Tensor]:
    """At least `floats` numbers of float32, aligned to 64 bytes, for one call at a time; a second call that runs beside
    it gets fresh memory."""
    if not _lock.acquire(blocking=False):
        yield torch.empty(floats)
        return
    try:
        if not _kept or _kept[0].shape[0] < floats:
            _kept.clear()  # before there is more
            _kept.append(torch.empty(floats))
        yield _kept[0]
    finally:
        _lock.release()
