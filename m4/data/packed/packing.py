"""Packs data sets: writes shards, then the index. Killed at any moment it leaves the data set as it was.

Shards are written under temporary names, flushed, and named by their digest; ``packing.json`` remembers those that are
done until the index lists them, so that the same command goes on where it was stopped. Only the replacement of the
index changes what readers see.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from m4.bars import tqdm
from m4.data.checks import MAX_NAME, check_apart, check_whole
from m4.data.layout import SPLITS
from m4.data.locking import LOCK, locked
from m4.data.packed.check import Cache, tokens_of, verify
from m4.data.packed.index import INDEX, JOURNAL, SHARDS, Index, Shard, is_packed, read_index, shard_of
from m4.data.packed.samples import Samples, split_rows, split_samples
from m4.data.packed.sources import Source, source_of, widened
from m4.data.packed.splits import with_splits
from m4.errors import data_error
from m4.files import writable_folder, write_atomically

SHARD_ROWS = 2**18  # 310 MB of M4's rows; what an interruption loses at most
_BLOCK = 2**13  # rows read at once
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packed:
    """Outcome: samples of each split, how many of them were added, how many of the source were there before."""

    splits: dict[str, int]
    added: int
    present: int


def pack(
    sources: Sequence[Path],
    out: Path,
    *,
    modalities: Mapping[str, int | None] | None = None,
    prefix: str = "",
    shard_rows: int = SHARD_ROWS,
    progress: bool = True,
) -> Packed:
    """Pack data sets, in folders or packed, into ``out``, and add them to what is packed there already.

    Args:
        modalities: which, in this order, and their tokens a sample where the files do not say; default those of
            ``out``, or all that are there.
        prefix: put before the names of samples and videos, to tell apart those of data sets that number from 0.
        shard_rows: samples of a shard at most.
    Raises:
        DataError: a source that cannot be packed or does not fit ``out``, a sample that is there with other tokens.
    """
    check_whole("shard_rows", shard_rows, 1)
    check_prefix(prefix)
    done = Packed({}, 0, 0)
    for root in sources:
        check_apart(out, root)
    for root in sources:
        like = _existing(out)
        source = source_of(root, modalities or {}, like)
        _check_out(out)
        writable_folder(out)
        with locked(out / LOCK, str(out)):
            more = add(source, out, _existing(out), prefix, shard_rows, progress)
        done = Packed(more.splits, done.added + more.added, done.present + more.present)
    return done


def add(
    source: Source,
    out: Path,
    index: Index | None,
    prefix: str = "",
    shard_rows: int = SHARD_ROWS,
    progress: bool = True,
) -> Packed:
    """`pack` of one source to what ``index`` lists, None for nothing. The caller holds the lock of ``out``."""
    writable_folder(out / SHARDS)
    if index is None:
        index = Index(source.columns, meta=source.meta)
    else:
        verify(out, index, Cache(out))
        _check_fits(out, index, source)
    journal = Journal(out)
    present, shards = 0, list(index.shards)
    added: dict[str, list[int]] = {}
    work = {split: _fresh(out, index, source, split, prefix) for split in source.splits}
    bar = tqdm(
        total=sum(map(len, work.values())),
        desc="pack",
        unit="sample",
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
    with bar:
        for split, rows in work.items():
            present += len(source.splits[split]) - len(rows)
            for start in range(0, len(rows), shard_rows):
                first = sum(shard.rows for shard in shards)
                chosen = rows[start : start + shard_rows]
                shards.append(journal.shard(source, split, chosen, prefix, bar.update))
                added.setdefault(split, []).extend(range(first, first + len(chosen)))
    if added:
        index = _joined(out, index, source, shards, added)
        index.write(out)
    (out / JOURNAL).unlink(missing_ok=True)
    sweep(out, index)
    verify(out, index, Cache(out))
    totals = {split: rows.rows for split, rows in index.splits.items()}
    return Packed(totals, sum(map(len, added.values())), present)


class Journal:
    """The shards that a run has finished and the index does not list yet, by what they were made of."""

    def __init__(self, out: Path) -> None:
        self._out = out
        try:
            content = json.loads((out / JOURNAL).read_text())
            self._done = {key: shard_of(shard) for key, shard in content.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            self._done = {}
        self._write()  # from now on readers know that the data set is unfinished, if it is new

    def shard(
        self, source: Source, split: str, rows: Sequence[int], prefix: str, tick: Callable[[int], object]
    ) -> Shard:
        """The shard of some rows of a source: that of a run before, or written now."""
        stamp = source.stamp(split, rows)
        columns = [(column.name, column.length) for column in source.columns]
        key = hashlib.sha256(json.dumps([columns, split, prefix, len(rows), stamp]).encode()).hexdigest()
        shard = self._done.get(key)
        if shard is not None and self._whole(shard, source):
            tick(shard.rows)
        else:
            shard = _write_shard(self._out / SHARDS, source, split, rows, prefix, tick)
            if source.stamp(split, rows) != stamp:
                raise data_error(
                    source.what,
                    expected="token files that stay as they are while they are packed",
                    actual="some that were written to meanwhile",
                    remedy="Run this again once whatever writes there has finished.",
                )
            self._done[key] = shard
            self._write()
        return shard

    def _whole(self, shard: Shard, source: Source) -> bool:
        folder, length = self._out / SHARDS, sum(column.length for column in source.columns)
        with suppress(FileNotFoundError):
            return (folder / shard.tokens).stat().st_size == 2 * shard.rows * length and (
                folder / shard.samples
            ).exists()
        return False

    def _write(self) -> None:
        content = {key: asdict(shard) for key, shard in self._done.items()}
        write_atomically(self._out / JOURNAL, json.dumps(content).encode())


def sweep(out: Path, index: Index) -> None:
    """Remove what belongs to no data set: of runs that were killed, and of splits that are no more."""
    for path in (out / SHARDS).iterdir():
        if path.name not in index.files():
            path.unlink(missing_ok=True)


def _write_shard(
    folder: Path, source: Source, split: str, rows: Sequence[int], prefix: str, tick: Callable[[int], object]
) -> Shard:
    digest, samples, notes = hashlib.sha256(), Samples(), dict[str, int]()
    largest = [[-1, 0] for _ in source.columns]
    ends = np.cumsum([column.length for column in source.columns])
    with _new_file(folder) as (file, temporary):
        for start in range(0, len(rows), _BLOCK):
            block = source.read(split, rows[start : start + _BLOCK])
            content = np.ascontiguousarray(block.tokens, dtype="<u2")
            file.write(content.data)
            digest.update(content.data)
            samples.extend(block.samples)
            for note, files in block.notes.items():
                notes[note] = notes.get(note, 0) + files
            for number, part in enumerate(np.split(content, ends[:-1], axis=1)):
                row = int(part.max(axis=1).argmax())
                if int(part[row].max()) > largest[number][0]:
                    largest[number] = [int(part[row].max()), start + row]
            tick(len(content))
        file.flush()
        os.fsync(file.fileno())
        tokens = f"{digest.hexdigest()[:20]}.u16"
        temporary.replace(folder / tokens)
    samples.names = [prefix + name for name in samples.names]
    samples.videos = [None if video is None else prefix + video for video in samples.videos]
    text = samples.content()
    samples_digest = hashlib.sha256(text).hexdigest()
    write_atomically(folder / f"{samples_digest[:20]}.json", text)
    return Shard(len(rows), tokens, digest.hexdigest(), f"{samples_digest[:20]}.json", samples_digest, largest, notes)


@contextmanager
def _new_file(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file under a temporary name. Raises OSError naming the folder: a full disk does not say for which file."""
    temporary = folder / f".{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file, temporary
    except OSError as error:
        raise type(error)(error.errno, error.strerror, error.filename or str(folder)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _joined(out: Path, index: Index, source: Source, shards: list[Shard], added: dict[str, list[int]]) -> Index:
    """The index with the new shards, whose rows are ``added`` to their splits."""
    columns = [
        widened(column, max(other.vocab_size, *(shard.largest[number][0] + 1 for shard in shards)))
        for number, (column, other) in enumerate(zip(index.columns, source.columns, strict=True))
    ]
    rows = {split: np.array(split_rows(out, index, split)) for split in index.splits}
    for split, numbers in added.items():
        rows[split] = np.concatenate([rows.get(split, np.empty(0, np.int64)), np.array(numbers)])
    meta = dict(index.meta)
    totals = {s: len(rows.get(s, ())) for s in SPLITS if s in rows or s in meta.get("splits", {})}
    if meta and index.shards:  # no longer what one run of prepare made
        meta = {key: value for key, value in meta.items() if key not in ("content", "videos_digest", "videos")}
    if meta:
        meta["splits"] = totals
    joined = replace(index, columns=columns, shards=shards, meta=meta)
    return with_splits(out, joined, rows)


def _fresh(out: Path, index: Index, source: Source, split: str, prefix: str) -> list[int]:
    """The rows of a source's split that are not there yet. Raises DataError for one that is there with other tokens."""
    names = [prefix + name for name in source.splits[split]]
    for name in names:
        check_sample_name(source.what, name)
    if split not in index.splits:
        return list(range(len(names)))
    there = {name: row for row, name in enumerate(split_samples(out, index, split).names)}
    known = [row for row, name in enumerate(names) if name in there]
    tokens = tokens_of(out, index, split)
    for start in range(0, len(known), _BLOCK):
        rows = known[start : start + _BLOCK]
        same = (source.read(split, rows).tokens == tokens[np.array([there[names[row]] for row in rows])]).all(axis=1)
        if not same.all():
            name = names[rows[int(same.argmin())]]
            raise data_error(
                f"{source.what} ({split}/{name})",
                expected=f"a sample that is not in {out} yet, or the same one",
                actual="one of that name with other tokens",
                remedy="Tell the samples apart with --prefix TEXT, or pack into another folder.",
            )
    return [row for row, name in enumerate(names) if name not in there]


def check_sample_name(what: str, name: str) -> None:
    """Raises DataError for a name that no file could have, or that is not text."""
    try:
        fits = len(name.encode()) <= MAX_NAME and "/" not in name
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise data_error(
            what, expected=f"sample names in UTF-8 of at most {MAX_NAME} bytes", actual=ascii(name), remedy="Rename it."
        )


def check_prefix(prefix: str) -> None:
    """Raises DataError for a prefix that makes no names of folders."""
    if "/" in prefix or "\0" in prefix or prefix.startswith(".") or not prefix.isprintable():
        raise data_error(
            "prefix", expected="text without / that does not begin with .", actual=repr(prefix), remedy="Correct it."
        )


def _existing(out: Path) -> Index | None:
    return read_index(out) if (out / INDEX).is_file() else None


def _check_out(out: Path) -> None:
    if out.is_dir() and not is_packed(out):
        foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in (LOCK, SHARDS, ".videos"))
        if foreign:
            raise data_error(
                out,
                expected="an empty folder, or a packed data set to add to",
                actual=f"{', '.join(foreign[:5])} of something else",
                remedy="Choose another --out.",
            )


def _check_fits(out: Path, index: Index, source: Source) -> None:
    ours, theirs = ([(c.name, c.length) for c in columns] for columns in (index.columns, source.columns))
    if ours != theirs:
        ours_said, theirs_said = (", ".join(f"{n} of {length}" for n, length in c) for c in (ours, theirs))
        raise data_error(
            source.what,
            expected=f"the modalities of {out}, {ours_said} tokens",
            actual=theirs_said,
            remedy="Choose them with --modality, or pack into another folder.",
        )
    one, other = index.meta.get("tokenizer"), source.meta.get("tokenizer")
    if index.meta and source.meta and one != other:
        raise data_error(
            source.what,
            expected=f"data made with the image tokenizer of {out}, {one}",
            actual=str(other),
            remedy="Their codes mean different pictures: pack into another folder.",
        )
    mine, yours = index.meta.get("options", {}), source.meta.get("options", {})
    for key in ("framing", "ssim_threshold", "captions"):
        if index.meta and source.meta and mine.get(key) != yours.get(key):
            _log.warning("%s was prepared with %s %s, %s with %s", source.what, key, yours.get(key), out, mine.get(key))
