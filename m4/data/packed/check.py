"""Whether the files of a packed data set are what its index says, read no more often than need be.

At every opening each file is there with its size, and the index has its own digest. The SHA-256 of a file is computed
when it is first opened on a machine and again when its status differs (`m4.data.stamps`): after it was copied, moved or
written to. What was found is remembered in the cache folder; processes that start together wait for the one that reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m4.data.locking import locked
from m4.data.packed.index import SHARDS, Index, damaged
from m4.data.packed.rows import ShardRows, SplitTokens
from m4.data.packed.samples import split_rows, split_samples
from m4.data.stamps import FileStamp
from m4.errors import DataError, data_error
from m4.files import writable_folder, write_atomically

_BLOCK = 1 << 22  # bytes read at once
_ROWS = 1 << 13  # rows read at once
_log = logging.getLogger(__name__)


class Cache:
    """What was found out about a packed data set on this machine: small JSON files in a folder.

    The folder is ``{root}/.cache``, or ``cache_dir``. Where it cannot be written to, a warning says so and nothing is
    remembered.
    """

    def __init__(self, root: Path, cache_dir: str | os.PathLike | None = None) -> None:
        self._root, self.folder = root, root / ".cache" if cache_dir is None else Path(cache_dir)
        self._place = "" if cache_dir is None else hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16] + "-"

    def path(self, name: str) -> Path:
        """Where the file ``name`` lies; several data sets may share a folder."""
        return self.folder / f"packed-{self._place}{name}"

    def read(self, name: str) -> dict[str, Any]:
        """Its content, {} where there is none that can be read."""
        try:
            content = json.loads(self.path(name).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Remember it."""
        write_atomically(self.path(name), json.dumps(content).encode())

    def usable(self) -> bool:
        """Whether it can be written to, which a warning denies."""
        try:
            writable_folder(self.folder)
        except DataError:
            _log.warning(
                "%s cannot be written to, so %s is read and checked at every start; set data.cache_dir to a folder of "
                "your own",
                self.folder,
                self._root,
            )
            return False
        return True


def verify(root: Path, index: Index, cache: Cache) -> None:
    """Make sure that the data set is whole; see the module's text. Raises DataError naming the file."""
    if not _pending(root, index, cache):
        return
    if not cache.usable():
        _read_through(root, index, list(index.files()))
        return
    with locked(cache.path(".lock"), str(cache.folder)):
        pending = _pending(root, index, cache)  # another process may have read them meanwhile
        if not pending:
            return
        _settle(root, pending)
        stamps = _stamps(root, index)
        _read_through(root, index, pending)
        if _stamps(root, index) != stamps:
            raise data_error(
                root / SHARDS,
                expected="files that stay as they are while they are checked",
                actual="some that were written to meanwhile",
                remedy="Run this again once whatever writes there has finished.",
            )
        cache.write("checked.json", stamps)


def _pending(root: Path, index: Index, cache: Cache) -> list[str]:
    """The files whose content is not known to be right; DataError for one that is not there or of another size."""
    known, stamps = cache.read("checked.json"), _stamps(root, index)
    return [name for name, stamp in stamps.items() if known.get(name) != stamp]


def _stamps(root: Path, index: Index) -> dict[str, str]:
    """File → its digest by the index and its status."""
    sizes = {shard.tokens: 2 * shard.rows * index.row_tokens for shard in index.shards}
    sizes |= {split.file: 8 * split.rows for split in index.splits.values() if split.file is not None}
    stamps, folder = {}, str(root / SHARDS)
    for name, digest in index.files().items():
        size = sizes.get(name)
        try:
            status = os.stat(f"{folder}/{name}")
        except FileNotFoundError:
            raise damaged(root / SHARDS / name, "a file of this packed data set", "no such file") from None
        if size is not None and status.st_size != size:
            raise damaged(root / SHARDS / name, f"{size:,} bytes", f"{status.st_size:,}")
        stamp = FileStamp()
        stamp.add(f"{name}:{digest}", status)
        stamps[name] = stamp.hexdigest()
    return stamps


def _settle(root: Path, names: Sequence[str]) -> None:
    stamp = FileStamp()
    for name in names:
        stamp.add(name, (root / SHARDS / name).stat())
    stamp.settle()


def _read_through(root: Path, index: Index, names: Sequence[str]) -> None:
    digests = index.files()
    size = sum((root / SHARDS / name).stat().st_size for name in names)
    _log.info("checking the digests of %d files (%.1f MB) in %s", len(names), size / 1e6, root)
    for name in names:
        path = root / SHARDS / name
        with open(path, "rb") as file:
            found = digest_of(iter(partial(file.read, _BLOCK), b""))
        if found != digests[name]:
            raise damaged(path, f"content with the SHA-256 {digests[name][:16]}…", f"{found[:16]}…")


def digest_of(blocks: Iterable[bytes]) -> str:
    """SHA-256 of blocks one after another."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def tokens_of(
    root: Path, index: Index, split: str, columns: slice | np.ndarray = slice(None)
) -> np.ndarray | SplitTokens:
    """The rows of a split in their order, of all tokens or some: a memory map where one file holds them as they are."""
    shards = ShardRows([(root / SHARDS / shard.tokens, shard.rows) for shard in index.shards], index.row_tokens)
    rows = split_rows(root, index, split)
    if isinstance(rows, range) and isinstance(columns, slice) and columns == slice(None):
        whole = shards.stretch(rows.start, rows.stop)
        if whole is not None:
            return whole
    return SplitTokens(shards, rows, columns)


def fingerprint_of(
    modalities: Sequence[str], max_seq_lens: Sequence[int], names: Sequence[str], tokens: np.ndarray | SplitTokens
) -> str:
    """`m4.data.store.TokenStore.fingerprint`: of the layout of a row, the names of the samples and their tokens."""
    digest = hashlib.sha256(json.dumps([list(modalities), list(max_seq_lens), list(names)]).encode())
    for start in range(0, len(tokens), _ROWS):
        digest.update(np.ascontiguousarray(tokens[start : start + _ROWS], dtype="<u2").data)
    return digest.hexdigest()


def fingerprint(
    root: Path, index: Index, split: str, modalities: list[str], max_seq_lens: list[int], columns: Any, cache: Cache
) -> str:
    """That of a split for some of its columns: read through once, and remembered."""
    if modalities == [column.name for column in index.columns]:
        return index.splits[split].fingerprint
    key = hashlib.sha256(json.dumps([index.digest, split, modalities]).encode()).hexdigest()[:16]
    found = cache.read(f"{key}.json").get("fingerprint")
    if isinstance(found, str):
        return found
    names = split_samples(root, index, split).names
    found = fingerprint_of(modalities, max_seq_lens, names, tokens_of(root, index, split, columns))
    if cache.usable():
        cache.write(f"{key}.json", {"fingerprint": found})
    return found
