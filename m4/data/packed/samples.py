"""Who the rows are: names, videos, frames and captions of samples, in a file beside every shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from m4.data.packed.index import SHARDS, Index, damaged


@dataclass
class Samples:
    """The samples of some rows, in their order; what is not known of one is None."""

    names: list[str] = field(default_factory=list)
    videos: list[str | None] = field(default_factory=list)
    frames: list[list[int] | None] = field(default_factory=list)  # reference and successor, from 1
    captions: list[str | None] = field(default_factory=list)

    def extend(self, other: Samples) -> None:
        """Add those of ``other`` at the end."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def take(self, rows: Sequence[int] | np.ndarray) -> Samples:
        """Those of some rows."""
        return Samples(**{name: [values[row] for row in rows] for name, values in vars(self).items()})

    def content(self) -> bytes:
        """The file that holds them."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()


def read_samples(root: Path, index: Index, shards: Sequence[int] | None = None) -> Samples:
    """The samples of all shards, or of some, in the order of their rows. Raises DataError for a damaged file."""
    found = Samples()
    for number in range(len(index.shards)) if shards is None else shards:
        shard = index.shards[number]
        path = root / SHARDS / shard.samples
        try:
            part = Samples(**json.loads(path.read_text("utf-8")))
            if not all(len(values) == shard.rows for values in vars(part).values()):
                raise ValueError(f"not {shard.rows} samples")
        except (OSError, ValueError, TypeError) as error:
            raise damaged(path, "the samples of a shard", str(error)) from error
        found.extend(part)
    return found


def split_rows(root: Path, index: Index, split: str) -> range | np.ndarray:
    """The rows of a split in their order: a stretch, or int64 (N,), memory-mapped. Raises DataError."""
    rows = index.splits[split]
    if rows.file is None:
        return range(rows.first, rows.first + rows.rows)
    return np.memmap(root / SHARDS / rows.file, dtype="<i8", mode="r", shape=(rows.rows,))


def split_samples(root: Path, index: Index, split: str) -> Samples:
    """The samples of a split in the order of its rows."""
    rows = split_rows(root, index, split)
    ends = np.cumsum([shard.rows for shard in index.shards])
    if not isinstance(rows, range):
        return read_samples(root, index).take(rows)
    first, last = np.searchsorted(ends, [rows.start, max(rows.start, rows.stop - 1)], side="right").tolist()
    skipped = rows.start - (int(ends[first]) - index.shards[first].rows)
    return read_samples(root, index, range(first, last + 1)).take(range(skipped, skipped + len(rows)))


class SplitNames(Sequence[str]):
    """The names of a split's samples, read when one is first asked for: ten million take seconds."""

    def __init__(self, root: Path, index: Index, split: str) -> None:
        self._root, self._index, self._split = root, index, split
        self._names: list[str] | None = None

    def __len__(self) -> int:
        return self._index.splits[self._split].rows

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[str]: ...
    def __getitem__(self, row: int | slice) -> str | Sequence[str]:
        return self.read()[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.read() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def read(self) -> list[str]:
        """All names."""
        if self._names is None:
            self._names = split_samples(self._root, self._index, self._split).names
        return self._names
