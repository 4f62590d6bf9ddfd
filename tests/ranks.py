"""Ranks of a run as processes of their own, started as torchrun does, which takes seconds more; all are bounded."""

import socket
import subprocess
import sys
import time
from contextlib import contextmanager

from tests.runs import REPOSITORY, environment

SECONDS = 150  # for whatever a test waits for


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@contextmanager
def started(size, *command):
    """The processes of ``python -m command``, one a rank; none is left behind."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=REPOSITORY,
            env={**environment(), **address, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ended(processes):
    """(status, what it said on stderr) of each rank."""
    end = time.monotonic() + SECONDS
    said = [process.communicate(timeout=max(1, end - time.monotonic()))[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def run_ranks(size, *command):
    """Like `ended`, of ranks that are left alone."""
    with started(size, *command) as processes:
        return ended(processes)


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
