"""How a run saves: at once, or from a copy that a thread writes while training goes on (``async_checkpoints``).

What a thread writes is as whole or absent as any checkpoint: it is renamed when it is on the disk. One is written at a
time. A save waits for the one before it, and learns then what became of it; so does whatever ends a run.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from m4.checkpoint import RunIdentity, save_checkpoint
from m4.config import TrainConfig
from m4.device import out_of_memory
from m4.distributed import World
from m4.errors import CheckpointError
from m4.run.metrics import RunLog
from m4.schedule import Schedule
from m4.training.contents import Contents

log = logging.getLogger(__name__)

_FAILURES = (CheckpointError, OSError)  # of a disk; anything else is a bug


class HostCopy:
    """Copies the tensors of a tree of dicts, lists and tuples to the host, into the same memory every time.

    Those of a GPU go to pinned memory, of which torch takes powers of two.
    """

    def __init__(self) -> None:
        self._held: dict[tuple, Tensor] = {}
        self._on_gpu = False

    @torch.no_grad()
    def __call__(self, tree: Any) -> Any:
        """The tree with copies; those of the call before are overwritten."""
        self._on_gpu = False
        copied = self._copy(tree, ())
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, tree: Any, place: tuple) -> Any:
        if isinstance(tree, Tensor):
            self._on_gpu |= tree.is_cuda
            held = self._held.get(place)
            if held is None or held.shape != tree.shape or held.dtype != tree.dtype:
                held = self._held[place] = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=tree.is_cuda)
            return held.copy_(tree, non_blocking=True)
        if isinstance(tree, dict):
            return {key: self._copy(value, (*place, key)) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._copy(value, (*place, index)) for index, value in enumerate(tree))
        return tree

    def bytes(self) -> int:
        """Of all copies."""
        return sum(held.numel() * held.element_size() for held in self._held.values())


class Saver:
    """Writes the checkpoints of a run, on the first rank; all ranks call its methods alike.

    Args:
        config: the run.
        schedule: says when the next save is due.
        identity: of the run, for its checkpoints.
        world: its ranks.
    """

    def __init__(self, config: TrainConfig, schedule: Schedule, identity: RunIdentity, world: World) -> None:
        self._config, self._schedule, self._identity, self._world = config, schedule, identity, world
        self._in_background = config.async_checkpoints
        self._copy = HostCopy()
        self._thread: ThreadPoolExecutor | None = None  # while there is something to write, on the first rank
        self._begun: int | None = None  # step of the checkpoint that is being written
        self._writing: Future | None = None  # on the first rank
        self.saved_step = -1  # of the newest checkpoint, or of the one that this run was resumed from

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of this step; waits for one that is being written."""
        self.settle()
        return self.saved_step == step

    def writing(self) -> bool:
        """Whether this rank is writing a checkpoint at this moment."""
        return self._writing is not None and not self._writing.done()

    def settle(self) -> Exception | None:
        """Wait for the checkpoint that is being written, if there is one; returns what kept it from the disk, which the
        log has already.

        Raises:
            Exception: it was not the disk.
        """
        if self._begun is None:
            return None
        failure = self._world.by_first(self._finish, *_FAILURES)
        if failure is None:
            self.saved_step = self._begun
        self._begun = self._writing = None
        return failure

    def save(self, contents: Contents, run_log: RunLog | None, *, try_later: bool) -> None:
        """Write a checkpoint, after what leads to it is in the record of the run.

        Args:
            contents: they may share memory with what is trained.
            run_log: of the first rank.
            try_later: another save will follow. So it need not be at once; and where the disk is full or fails, that is
                said, and left to the next.
        Raises:
            CheckpointError, OSError: the disk is full or cannot be written, unless ``try_later``.
        """
        self.settle()
        in_background = try_later and self._in_background
        act = self._begin if in_background else self._write_at_once
        failure = self._world.by_first(lambda: act(contents, run_log), *_FAILURES)
        if failure is None and in_background:
            self._begun = contents.step
        elif failure is None:
            self.saved_step = contents.step
        elif not try_later:
            raise failure
        elif self._world.leads:
            self._say_not_saved(contents.step, failure)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, on this rank alone: the run ends, and not always together."""
        with suppress(*_FAILURES):  # said when it happened; who needs this checkpoint has asked with `settle`
            self._finish()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _begin(self, contents: Contents, run_log: RunLog | None) -> None:
        """Copy, and let the thread write; where there is no memory for that, write at once."""
        try:
            copied = contents.copied(self._copy)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self._copy = HostCopy()
            log.warning("async_checkpoints: no memory for a copy, so step %d is written at once", contents.step)
            self._write_at_once(contents, run_log)
            return
        if run_log is not None:
            run_log.flush()  # what leads to a checkpoint is on the disk before it
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._thread.submit(self._write_later, copied)

    def _write_at_once(self, contents: Contents, run_log: RunLog | None) -> None:
        if run_log is not None:
            run_log.flush()
        self._write(contents)

    def _write_later(self, contents: Contents) -> None:
        """In the thread: what fails is said at once, though training learns of it at the next save."""
        try:
            self._write(contents)
        except Exception as error:
            self._say_not_saved(contents.step, error)
            raise

    def _write(self, contents: Contents) -> None:
        c, config = contents, self._config
        path = save_checkpoint(
            config.run_dir, c.step, c.model, c.state, config, self._identity, c.evaluation_loss, c.averaged
        )
        log.info("saved %s", path)

    def _finish(self) -> None:
        """Wait, and raise what kept it from the disk. To be called again where a stop signal broke into the waiting."""
        if self._writing is None:
            return
        error = self._writing.exception()
        if error is not None:
            if not isinstance(error, _FAILURES):
                self._writing = None  # raised once
            raise error

    def _say_not_saved(self, step: int, failure: Exception) -> None:
        later = self._schedule.next_due(self._config.save_ckpt_freq, step)
        log.error("NOT SAVED after step %d: %s", step, failure)
        log.error("training goes on; the next save is tried after step %d, a stop signal tries at once", later)
