"""The index of a packed data set: what is in it, file by file, each with its digest.

::

    PACKED/packed.json          the index; its replacement is the one moment at which the data set changes
    PACKED/shards/X.u16         rows of tokens, little-endian uint16 (rows, L); X is the start of its SHA-256
    PACKED/shards/X.json        the samples of a shard: their names, videos, frames, captions
    PACKED/shards/X.rows        the rows of a split in their order, little-endian int64, where they are no stretch
    PACKED/.cache/              what was checked, and fingerprints of other choices of modalities; may be deleted

Files below ``shards/`` are never changed. Rows are numbered through all shards, in the order of the index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from m4.errors import DataError, data_error
from m4.files import write_atomically

FORMAT = "m4-packed-v1"
INDEX, SHARDS, JOURNAL = "packed.json", "shards", "packing.json"
_AGAIN = (
    "Restore it from a copy, or delete the folder and pack the data again: python -m m4.data pack ROOT --out PACKED."
)


@dataclass(frozen=True)
class Column:
    """A modality: its tokens in a row, the ids of its data, and how its token files look (for ``unpack``)."""

    name: str
    length: int
    vocab_size: int  # of the data: what meta.json says, or one more than the largest token
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Shard:
    """A file of rows and the file of their samples."""

    rows: int
    tokens: str  # names below SHARDS
    sha256: str
    samples: str
    samples_sha256: str
    largest: list[list[int]]  # of each column: its largest token, and a row of the shard that holds it
    notes: dict[str, int]  # what was assumed in reading its files → how many of them


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split in their order: the stretch from ``first``, or those listed in a file."""

    rows: int
    fingerprint: str  # of `m4.data.store.TokenStore`, for all columns in their order
    first: int = 0
    file: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Index:
    """All of packed.json. meta: what meta.json says of a data set in folders, {} where it had none."""

    columns: list[Column]
    shards: list[Shard] = field(default_factory=list)
    splits: dict[str, SplitRows] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return sum(column.length for column in self.columns)

    def files(self) -> dict[str, str]:
        """Every file below SHARDS that belongs to the data set → its SHA-256."""
        found = {name: digest for s in self.shards for name, digest in _files_of(s)}
        return found | {s.file: s.sha256 for s in self.splits.values() if s.file is not None and s.sha256 is not None}

    @cached_property
    def digest(self) -> str:
        """Of everything it says, and so of the content of the data set."""
        return _digest_of(self.content())

    def content(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "columns": [vars(column) for column in self.columns],
            "shards": [vars(shard) for shard in self.shards],
            "splits": {name: vars(split) for name, split in self.splits.items()},
            "meta": self.meta,
        }

    def write(self, root: Path) -> None:
        """Make this the index of the data set. Raises OSError."""
        text = json.dumps({"format": FORMAT, "digest": self.digest, **self.content()}, indent=1)
        write_atomically(root / INDEX, (text + "\n").encode())


def is_packed(root: Path) -> bool:
    """Whether a folder is a packed data set, be it unfinished."""
    return (root / INDEX).is_file() or (root / JOURNAL).is_file()


def read_index(root: Path) -> Index:
    """The index of a packed data set. Raises DataError for one that is unfinished or damaged, or of another version."""
    path = root / INDEX
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError("it has no format")
    except FileNotFoundError:
        raise data_error(
            root,
            expected="a finished packed data set",
            actual=f"one that is being packed, or was when a run was cut off (no {INDEX})",
            remedy="Wait for that run, or give its command again: it goes on.",
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise damaged(path, "the index of a packed data set, in JSON", str(error)) from error
    if content["format"] != FORMAT:
        raise damaged(path, f"format {FORMAT}", str(content["format"]))
    try:
        index = Index(
            [Column(**column) for column in content["columns"]],
            [shard_of(shard) for shard in content["shards"]],
            {name: SplitRows(**split) for name, split in content["splits"].items()},
            content["meta"],
        )
        digest = content.pop("digest")
    except (AttributeError, KeyError, TypeError) as error:
        raise damaged(path, "the index of a packed data set", f"one that lacks or adds something ({error})") from error
    del content["format"]
    if digest != _digest_of(content):
        raise damaged(path, "an index with its own digest", "one that was changed or damaged")
    return index


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shard_of(content: Mapping[str, Any]) -> Shard:
    """A shard from JSON. Raises TypeError."""
    return Shard(**content)


def damaged(path: Path, expected: str, actual: str) -> DataError:
    """The error for a file of a packed data set that is not what it should be."""
    return data_error(path, expected=expected, actual=actual, remedy=_AGAIN)


def _files_of(shard: Shard) -> list[tuple[str, str]]:
    return [(shard.tokens, shard.sha256), (shard.samples, shard.samples_sha256)]
