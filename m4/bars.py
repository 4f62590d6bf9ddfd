"""Progress bars: tqdm, with a lock of this process alone.

tqdm's own lock is one that forked processes share. One that is killed while it draws would hold it for ever, and every
later bar of the others would wait for it.
"""

from __future__ import annotations

import os
import threading

from m4.extras import extra

with extra("train"):  # every command comes by here; those of data need less, the extra data
    from tqdm import tqdm


def _own_lock() -> None:
    tqdm.set_lock(threading.RLock())


_own_lock()
if hasattr(os, "register_at_fork"):  # a child may be made while a thread holds the lock
    os.register_at_fork(after_in_child=_own_lock)

__all__ = ["tqdm"]
