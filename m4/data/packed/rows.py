"""Rows of several memory-mapped files, indexed as if they were one array."""

from __future__ import annotations

import mmap
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# A mapped file takes a file descriptor; of those that a process may have (1,024 as a rule) half are left to others.
_SHARE_OF_DESCRIPTORS = 2


class ShardRows:
    """All rows of some shards, uint16 (N, L); files are mapped when they are first read.

    Args:
        files: the paths of the shards and their rows.
        length: L.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], length: int) -> None:
        self._paths = [path for path, _ in files]
        self._rows = [rows for _, rows in files]
        self._ends = np.cumsum([0, *self._rows])[1:]
        self.length = length
        self._open: dict[tuple[int, bool], np.memmap] = {}
        self._most_open = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SHARE_OF_DESCRIPTORS)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def gather(self, numbers: np.ndarray, columns: slice | np.ndarray) -> np.ndarray:
        """The columns of the rows ``numbers``, int64 (B,), as a copy (B, …)."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        present = np.unique(shards)
        if len(present) == 1:
            shard = int(present[0])
            return self._map(shard, scattered=True)[numbers - self._start(shard)][:, columns]
        width = len(np.arange(self.length)[columns])
        result = np.empty((len(numbers), width), np.uint16)
        order = np.argsort(shards, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(order) else []:
            shard = int(shards[part[0]])
            part_rows = self._map(shard, scattered=True)[numbers[part] - self._start(shard)]
            result[part] = part_rows[:, columns]
        return result

    def stretch(self, start: int, stop: int) -> np.ndarray | None:
        """The rows start … stop - 1 as a memory map, where one shard holds them all."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        if stop <= start or shard >= len(self._paths) or stop > self._ends[shard]:
            return None
        first = self._start(shard)
        return self._map(shard, scattered=False)[start - first : stop - first]

    def _start(self, shard: int) -> int:
        return int(self._ends[shard]) - self._rows[shard]

    def _map(self, shard: int, *, scattered: bool) -> np.memmap:
        found = self._open.pop((shard, scattered), None)
        if found is None:
            while len(self._open) >= self._most_open:
                del self._open[next(iter(self._open))]  # the longest unused
            shape = (self._rows[shard], self.length)
            found = np.memmap(self._paths[shard], dtype="<u2", mode="r", shape=shape)
            if scattered:  # else every row of a file that is not in memory would read 128 kB around it
                found._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        self._open[shard, scattered] = found
        return found


class SplitTokens:
    """The rows of a split: a read-only array (N, L) of uint16 as far as indexing with rows, and with rows and columns,
    goes. What it gives is an array: a view of the file where that is possible, else a copy.

    Args:
        shards: the rows of the data set.
        rows: which of them, in order: a stretch, or int64 (N,).
        columns: which tokens of a row.
    """

    dtype = np.dtype(np.uint16)
    ndim = 2

    def __init__(self, shards: ShardRows, rows: range | np.ndarray, columns: slice | np.ndarray) -> None:
        self._shards, self._rows = shards, rows
        self._columns = columns
        self.shape = (len(rows), len(np.arange(shards.length)[columns]))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return 2 * self.shape[0] * self.shape[1]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        chosen = np.arange(self._shards.length)[self._columns][columns]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if isinstance(self._rows, range) and step == 1 and isinstance(self._columns, slice):
                found = self._shards.stretch(self._rows.start + start, self._rows.start + max(start, stop))
                if found is not None:
                    return found[:, self._columns][:, columns]
            rows = np.arange(start, stop, step)
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        flat = rows.astype(np.int64).ravel()
        if len(flat) and not -len(self) <= int(flat.min()) <= int(flat.max()) < len(self):
            raise IndexError(f"rows {flat.min()} … {flat.max()} of {len(self)}")
        flat = np.where(flat < 0, flat + len(self), flat)
        numbers = flat + self._rows.start if isinstance(self._rows, range) else self._rows[flat]
        found = self._shards.gather(np.asarray(numbers), np.atleast_1d(chosen))
        return found.reshape(*rows.shape, *np.shape(chosen))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self[:]
        return found if dtype is None else found.astype(dtype)
