"""Which rows of a packed data set are whose: the splits, and dividing the samples anew."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from m4.data.layout import SPLITS
from m4.data.locking import LOCK, locked
from m4.data.packed.check import Cache, fingerprint_of, tokens_of, verify
from m4.data.packed.index import SHARDS, Index, SplitRows, read_index
from m4.data.packed.samples import Samples, read_samples
from m4.data.split import FRACTIONS, assigned, check_split, described
from m4.errors import data_error
from m4.files import write_atomically


def with_splits(root: Path, index: Index, rows: Mapping[str, np.ndarray]) -> Index:
    """The index with these rows in its splits, int64 (N,), put in the order of the names of their samples.

    Files that it needs are written; the index is not. A fingerprint is that of the same samples in folders.
    """
    names = np.array(read_samples(root, index).names, dtype=object)
    splits = {}
    for split in SPLITS:
        if split not in rows or not len(rows[split]):
            continue
        order = sorted(rows[split].tolist(), key=names.__getitem__)
        entry = _entry(root, np.array(order, dtype=np.int64))
        there = index.splits.get(split)
        if there is not None and replace(there, fingerprint="") == entry:
            splits[split] = there
            continue
        probe = replace(index, splits={split: entry})
        found = fingerprint_of(
            [column.name for column in index.columns],
            [column.length for column in index.columns],
            names[order].tolist(),
            tokens_of(root, probe, split),
        )
        splits[split] = replace(entry, fingerprint=found)
    return replace(index, splits=splits)


def _entry(root: Path, order: np.ndarray) -> SplitRows:
    if (np.diff(order) == 1).all():
        return SplitRows(len(order), "", first=int(order[0]))
    content = order.astype("<i8").tobytes()
    digest = hashlib.sha256(content).hexdigest()
    write_atomically(root / SHARDS / f"{digest[:20]}.rows", content)
    return SplitRows(len(order), "", file=f"{digest[:20]}.rows", sha256=digest)


def split_packed(
    root: Path, fractions: Sequence[float] = FRACTIONS, seed: int = 42, unit: str = "video"
) -> dict[str, int]:
    """`m4.data.split.split_output_dataset` of a packed data set: the same samples in each split; no token is moved.

    Raises DataError for bad arguments, a damaged data set, a name that two samples have, or a sample whose video is not
    known, with ``unit="video"``.
    """
    check_split(fractions, seed, unit)
    with locked(root / LOCK, str(root)):
        return divide_packed(root, fractions, seed, unit)


def divide_packed(root: Path, fractions: Sequence[float], seed: int, unit: str) -> dict[str, int]:
    """`split_packed` by a caller that has checked the arguments and holds the root's lock."""
    index = read_index(root)
    verify(root, index, Cache(root))
    groups, numbers = _groups(root, read_samples(root, index), unit)
    members = assigned(groups, fractions, seed)
    rows = {split: np.array([numbers[name] for name in names], np.int64) for split, names in members.items()}
    totals = {split: len(names) for split, names in members.items()}
    new = with_splits(root, replace(index, meta=described(index.meta, fractions, seed, unit, totals)), rows)
    if new != index:
        new.write(root)
    for path in (root / SHARDS).glob("*.rows"):
        if path.name not in new.files():
            path.unlink()
    verify(root, new, Cache(root))
    return totals


def _groups(root: Path, samples: Samples, unit: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The samples that stay together, by name; and the row of each."""
    numbers = {name: row for row, name in enumerate(samples.names)}
    if len(numbers) < len(samples.names):
        twice = next(name for row, name in enumerate(samples.names) if numbers[name] != row)
        raise data_error(
            root,
            expected="each sample once",
            actual=f"two of the name {twice}, in different splits",
            remedy="Pack the splits with different --prefix, or leave them as they are.",
        )
    groups: dict[str, list[str]] = {}
    for name in sorted(numbers):
        video = samples.videos[numbers[name]] if unit == "video" else name
        if video is None:
            raise data_error(
                root,
                expected="the video of every sample",
                actual=f"none for {name}",
                remedy='Split with unit "pair", or pack data with a pairs.csv.',
            )
        groups.setdefault(video, []).append(name)
    return groups, numbers
