"""What can be packed: a data set in folders, another packed one, samples that ``prepare`` holds."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from m4.data.layout import find_pids, find_splits, read_caption, read_meta, read_pairs, token_file
from m4.data.packed.check import Cache, tokens_of, verify
from m4.data.packed.index import Column, Index, is_packed, read_index
from m4.data.packed.samples import Samples, split_samples
from m4.data.reading import read_packable
from m4.data.stamps import FileStamp
from m4.errors import data_error
from m4.modalities import TABLE, data_vocab_size


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows: tokens uint16 (n, L), their samples, and what was assumed in reading them."""

    tokens: np.ndarray
    samples: Samples
    notes: Mapping[str, int]


class Source(Protocol):
    """Rows to be packed. splits: the names of the samples of each split, sorted."""

    what: str
    columns: list[Column]
    meta: dict[str, Any]
    splits: dict[str, list[str]]

    def stamp(self, split: str, rows: Sequence[int]) -> str:
        """What changes when these rows of a split may have changed; read from now on, they are what it says."""
        ...

    def read(self, split: str, rows: Sequence[int]) -> Block:
        """These rows of a split. Raises DataError for what cannot be read."""
        ...


def source_of(root: Path, lengths: Mapping[str, int | None], like: Index | None) -> Source:
    """The data set in ``root``, to be packed.

    Args:
        lengths: the modalities, and their tokens a sample where the files do not say; {} for all that are there.
        like: of the data set that it is added to: its modalities, unless others are asked for.
    Raises:
        DataError: there is nothing there to be packed, or not that.
    """
    if not lengths and like is not None:
        lengths = {column.name: column.length for column in like.columns}
    return PackedSource(root, lengths) if is_packed(root) else FolderSource(root, lengths)


class FolderSource:
    """``{root}/{split}/{modality}/{pid}/{file}``, with captions and pairs.csv where they are there."""

    def __init__(self, root: Path, lengths: Mapping[str, int | None]) -> None:
        self.what, self._root = str(root), root
        present = find_splits(root)
        self.meta = read_meta(root)
        self.columns = [
            _column_of(root, present[0], *pair, self.meta) for pair in _modalities(root, present[0], lengths)
        ]
        self.splits = {split: find_pids(root, split, [c.name for c in self.columns]) for split in present}
        self._captions = [split for split in present if (root / split / "captions").is_dir()]
        for split in self._captions:
            find_pids(root, split, [self.columns[0].name, "captions"])
        self._pairs = read_pairs(root)
        self._found: dict[tuple[str, str, str], str] = {}  # the files that were stamped last

    def stamp(self, split: str, rows: Sequence[int]) -> str:
        stamp = FileStamp()
        self._found = {}
        for name in self._folders(split):
            for row in rows:
                pid = self.splits[split][row]
                entry = token_file(self._root / split / name / pid)
                stamp.add(f"{name}/{pid}/{entry.name}", entry.stat())
                self._found[split, name, pid] = entry.path
        stamp.settle()
        pairs = [self._pairs.get(self.splits[split][row]) for row in rows]
        return hashlib.sha256(json.dumps([stamp.hexdigest(), pairs]).encode()).hexdigest()

    def read(self, split: str, rows: Sequence[int]) -> Block:
        pids = [self.splits[split][row] for row in rows]
        parts: list[np.ndarray] = []
        notes: dict[str, int] = {}
        for column in self.columns:
            files = [self._file(split, column.name, pid) for pid in pids]
            part = read_packable(self._root, column.name, files, column.length, column.vocab_size or 2**16)
            parts.append(part.rows.astype(np.uint16))
            notes |= {f"{column.name}: {note}": files for note, files in part.notes.items()}
        pairs = [self._pairs.get(pid) for pid in pids]
        captions: list[str | None] = [None] * len(pids)
        if split in self._captions:
            captions = [read_caption(Path(self._file(split, "captions", pid))) for pid in pids]
        samples = Samples(
            pids,
            [None if pair is None else pair[0] for pair in pairs],
            [None if pair is None else list(pair[1:]) for pair in pairs],
            captions,
        )
        return Block(np.concatenate(parts, axis=1), samples, notes)

    def _file(self, split: str, name: str, pid: str) -> str:
        return self._found.get((split, name, pid)) or token_file(self._root / split / name / pid).path

    def _folders(self, split: str) -> list[str]:
        return [c.name for c in self.columns] + (["captions"] if split in self._captions else [])


class PackedSource:
    """Another packed data set, whole."""

    def __init__(self, root: Path, lengths: Mapping[str, int | None]) -> None:
        self.what, self._root = str(root), root
        index = read_index(root)
        verify(root, index, Cache(root))
        known = {column.name: column for column in index.columns}
        wanted = list(lengths) or list(known)
        for name in wanted:
            if name not in known or lengths.get(name) not in (None, known[name].length):
                raise data_error(
                    root,
                    expected=f"the modality {name}" + (f" of {lengths[name]} tokens" if lengths.get(name) else ""),
                    actual=f"{', '.join(f'{c.name} of {c.length}' for c in index.columns)}",
                    remedy="Choose others with --modality, or pack into another folder.",
                )
        ends = np.cumsum([column.length for column in index.columns])
        spans = {c.name: range(int(end) - c.length, int(end)) for c, end in zip(index.columns, ends, strict=True)}
        columns = np.concatenate([np.array(spans[name]) for name in wanted])
        self.meta, self.columns = index.meta, [known[name] for name in wanted]
        self._samples = {split: split_samples(root, index, split) for split in index.splits}
        self._tokens = {split: tokens_of(root, index, split, columns) for split in index.splits}
        self._digest = index.digest
        self._notes = {note: files for shard in index.shards for note, files in shard.notes.items()}
        self.splits = {split: samples.names for split, samples in self._samples.items()}

    def stamp(self, split: str, rows: Sequence[int]) -> str:
        return hashlib.sha256(json.dumps([self._digest, split, list(rows)]).encode()).hexdigest()

    def read(self, split: str, rows: Sequence[int]) -> Block:
        notes = {note: min(files, len(rows)) for note, files in self._notes.items()}
        return Block(self._tokens[split][np.array(rows)], self._samples[split].take(rows), notes)


def _modalities(root: Path, split: str, lengths: Mapping[str, int | None]) -> list[tuple[str, int | None]]:
    """The modalities of tokens, those of the table first; captions, which are text, go with their samples."""
    if lengths:
        return list(lengths.items())
    folders = {entry.name for entry in os.scandir(root / split) if entry.is_dir() and not entry.name.startswith(".")}
    names = [name for name in TABLE if name in folders] + sorted(folders - set(TABLE))
    found: list[tuple[str, int | None]] = [(n, None) for n in names if n not in TABLE or TABLE[n].kind != "text"]
    if not found:
        raise data_error(root / split, expected="modalities of tokens", actual="none", remedy="Prepare the data again.")
    return found


def _column_of(root: Path, split: str, name: str, length: int | None, meta: Mapping[str, Any]) -> Column:
    """A modality by its first file."""
    path = token_file(root / split / name / find_pids(root, split, [name])[0]).path
    try:
        array = np.load(path, allow_pickle=False)
        shape, dtype = list(array.shape), array.dtype
    except (OSError, ValueError, EOFError) as error:
        raise data_error(
            path,
            expected="a .npy file of tokens",
            actual=str(error),
            remedy="Prepare this sample again: python -m m4.data prepare.",
        ) from error
    known = TABLE[name].length if name in TABLE else None
    if length is None:
        length = known if known in (math.prod(shape), math.prod(shape[1:])) else math.prod(shape)
    if math.prod(shape) != length:
        shape = shape[1:]  # an augmentation axis, of which the first entry is taken
    if not length or math.prod(shape) != length:
        raise data_error(
            path,
            expected=f"{length or 'some'} tokens of {name}",
            actual=f"shape {tuple(array.shape)}",
            remedy=f"Say how many there are with --modality {name}:TOKENS.",
        )
    return Column(name, int(length), data_vocab_size(name, meta), shape, "<u2" if dtype.kind == "f" else dtype.str)


def widened(column: Column, vocab_size: int) -> Column:
    """The column of data with at least so many ids."""
    return replace(column, vocab_size=max(column.vocab_size, vocab_size))
