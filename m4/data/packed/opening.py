"""A split of a packed data set, opened for training."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m4.data.packed.check import Cache, fingerprint, tokens_of, verify
from m4.data.packed.index import INDEX, SHARDS, Column, Index, read_index
from m4.data.packed.rows import SplitTokens
from m4.data.packed.samples import SplitNames, read_samples, split_rows
from m4.errors import data_error

_log = logging.getLogger(__name__)


def open_rows(
    root: Path,
    split: str,
    modalities: list[str],
    vocab_sizes: list[int],
    max_seq_lens: list[int],
    cache_dir: str | os.PathLike | None = None,
) -> tuple[np.ndarray | SplitTokens, str, SplitNames]:
    """The tokens, fingerprint and names of `m4.data.store.open_store`. Raises DataError as it does."""
    index = read_index(root)
    if split not in index.splits:
        raise data_error(
            root / INDEX,
            expected=f"samples of the split {split}",
            actual=f"only {', '.join(index.splits)}",
            remedy="Split the data: python -m m4.data split ROOT.",
        )
    cache = Cache(root, cache_dir)
    verify(root, index, cache)
    starts = dict(
        zip((c.name for c in index.columns), np.cumsum([0, *(c.length for c in index.columns)]), strict=False)
    )
    spans = []
    for name, length in zip(modalities, max_seq_lens, strict=True):
        _find(root, index, name, length)
        spans.append(range(int(starts[name]), int(starts[name]) + length))
    for note, files in _notes(index, modalities).items():
        _log.info("%s%s", note, f" ({files} files)" if files else "")
    for name, size in zip(modalities, vocab_sizes, strict=True):
        _check_ids(root, index, split, name, size, slice(int(starts[name]), int(starts[name]) + _length(index, name)))
    columns = _joined(spans, index.row_tokens)
    tokens = tokens_of(root, index, split, columns)
    return (
        tokens,
        fingerprint(root, index, split, modalities, max_seq_lens, columns, cache),
        SplitNames(root, index, split),
    )


def _find(root: Path, index: Index, name: str, length: int) -> Column:
    for column in index.columns:
        if column.name == name:
            if column.length != length:
                raise data_error(
                    root / INDEX,
                    expected=f"{length} tokens of {name} a sample (max_seq_lens)",
                    actual=column.length,
                    remedy="Correct max_seq_lens, or pack the data again.",
                )
            return column
    raise data_error(
        root / INDEX,
        expected=f"the modality {name}",
        actual=f"only {', '.join(column.name for column in index.columns)}",
        remedy="Correct the list of modalities, or pack data that has this one.",
    )


def _length(index: Index, name: str) -> int:
    return next(column.length for column in index.columns if column.name == name)


def _notes(index: Index, modalities: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for shard in index.shards:
        for note, files in shard.notes.items():
            if note.partition(":")[0] in modalities:
                found[note] = found.get(note, 0) + files
    return found


def _check_ids(root: Path, index: Index, split: str, name: str, size: int, span: slice) -> None:
    """Raise DataError where the split has a token of the modality that is ``size`` or more."""
    column = [c.name for c in index.columns].index(name)
    rows = split_rows(root, index, split)
    first = 0
    for number, shard in enumerate(index.shards):
        if shard.largest[column][0] >= size:  # of any split
            path = root / SHARDS / shard.tokens
            tokens = np.memmap(path, dtype="<u2", mode="r", shape=(shard.rows, index.row_tokens))[:, span].max(axis=1)
            beyond = np.flatnonzero(tokens >= size)
            numbers = beyond + first
            if isinstance(rows, range):
                inside = beyond[(numbers >= rows.start) & (numbers < rows.stop)]
            else:
                inside = beyond[np.isin(numbers, rows)]
            if len(inside):
                row = int(inside[tokens[inside].argmax()])
                sample = read_samples(root, index, [number]).names[row]
                raise data_error(
                    f"{path}, row {row} ({split}/{name}/{sample})",
                    expected=f"tokens below {size} (vocab_sizes of {name})",
                    actual=int(tokens[row]),
                    remedy="Raise the vocabulary size, or prepare the data with the tokenizer that it was set for.",
                )
        first += shard.rows


def _joined(spans: list[range], row_tokens: int) -> slice | np.ndarray:
    """The tokens of a row that the spans list, as a stretch where they are one, all of them as ``slice(None)``."""
    chosen = np.concatenate([np.array(span) for span in spans])
    if (np.diff(chosen) == 1).all():
        start, stop = int(chosen[0]), int(chosen[-1]) + 1
        return slice(None) if (start, stop) == (0, row_tokens) else slice(start, stop)
    return chosen
