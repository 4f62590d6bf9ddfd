"""One process at a time: a lock on a folder, which falls with its holder however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  # of an output folder, in it
_log = logging.getLogger(__name__)


@contextmanager
def locked(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` (made if need be, never removed); while another process holds it, say so and wait.

    what: names in the log what the lock protects, such as the output folder. Where the file system has no locks, a
    warning says so and the work goes on. Not reentrant. Raises OSError where the file cannot be made.
    """
    path = Path(path)
    with open(path, "a+") as file:
        try:
            _acquire(file.fileno(), path, what)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            _log.warning(
                "%s: this file system has no locks (%s); see to it that no other process works here", what, error
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # before the lock falls, with the closing of the file


def _acquire(descriptor: int, path: Path, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = " ".join(path.read_text(errors="replace").split()) or "another process"
        _log.warning("waiting for %s, which is at work in %s", holder, what)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _log.info("%s is free now; going on", what)
