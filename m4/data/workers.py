"""One job a video, over several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

from m4.bars import tqdm

Job = TypeVar("Job")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def for_each(what: str, work: Callable[[Job], None], jobs: Sequence[Job], workers: int, progress: bool = True) -> None:
    """Call ``work`` (picklable) on every job, in ``workers`` processes; an interruption drops the jobs not begun.

    ``what`` names the bar on stderr. The first exception of a job is raised once the jobs that run have ended.
    """
    # In a log file the bar is renewed only now and then.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=len(jobs), desc=what, unit="video", disable=not (progress and jobs), mininterval=interval)
    with bar:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                work(job)
                bar.update()
            return
        # A fresh interpreter each: forking a process whose OpenMP threads have run can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker) as pool:
            try:
                # Ctrl-C reaches the whole group, and the parent alone decides what is dropped: workers start here, and
                # inherit the mask.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    with _one_thread_each():
                        futures = [pool.submit(work, job) for job in jobs]
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                for done in as_completed(futures):
                    done.result()
                    bar.update()
            except BaseException:
                # Waiting here, since leaving the pool at once would take the cancellation back.
                pool.shutdown(wait=True, cancel_futures=True)
                raise


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started meanwhile have one thread for numpy's linear algebra, which is not to be had otherwise."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker() -> None:
    """One thread a worker, and none outlives the parent: what it was writing is a temporary file, so it may stop."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
