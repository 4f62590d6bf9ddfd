"""The token store that training reads: one uint16 row of Σ max_seq_lens per sample, memory-mapped.

A packed data set (`m4.data.packed`) is read as it stands. Of ``{root}/{split}/{modality}/{pid}/{file}`` a packed cache
is built once, by one process while others wait, and built anew when the name or status of any file differs
(`m4.data.stamps`). Nothing of the preparation code is imported here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from m4.data.layout import find_pids, token_file
from m4.data.locking import locked
from m4.data.packed.check import fingerprint_of
from m4.data.packed.index import is_packed
from m4.data.packed.opening import open_rows
from m4.data.packed.rows import SplitTokens
from m4.data.reading import MAX_VOCAB, read_packable
from m4.data.stamps import FileStamp
from m4.errors import DataError, data_error
from m4.files import writable_folder, write_atomically

_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The samples of one split. Rows are in the order of ``pids``, modality after modality.

    tokens: memory-mapped uint16 (N, L), L = Σ max_seq_lens; every row is full. fingerprint: hex digest of the content,
    the same wherever the data lies, in folders or packed.
    """

    tokens: np.ndarray | SplitTokens
    fingerprint: str
    pids: Sequence[str]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """The rows ``rows`` (B,) as int64 (B, L)."""
        return torch.from_numpy(self.tokens[np.asarray(rows)].astype(np.int64))


def open_store(
    root: str | os.PathLike,
    split: str,
    modalities: Sequence[str],
    vocab_sizes: Sequence[int],
    max_seq_lens: Sequence[int],
    cache_dir: str | os.PathLike | None = None,
) -> TokenStore:
    """Open the store of ``split``; of a data set in folders it is built first if it is absent or out of date.

    The cache lies in ``{root}/.cache`` unless ``cache_dir`` is given. Readable token files are .npy arrays under any
    name: integers of any width, flat, of any shape with max_seq_lens[m] values, or with a leading augmentation axis, of
    which the first entry is taken; joints also as floats in [0, 1]. The log says what was assumed; what is recognised
    as made by other rules is refused (`m4.data.reading`). Raises DataError (a ValueError) naming the file or argument:
    a missing, empty or unfinished root, split or modality, a modality without one of the pids, a wrong length, a token
    outside [0, vocab_sizes[m]), a cache folder that cannot be written.
    """
    root = Path(root)
    modalities, max_seq_lens = list(modalities), [int(length) for length in max_seq_lens]
    vocab_sizes = [int(size) for size in vocab_sizes]
    if not modalities or not len(modalities) == len(vocab_sizes) == len(max_seq_lens):
        raise data_error(
            "modalities, vocab_sizes, max_seq_lens",
            expected="three lists of one length, at least 1",
            actual=f"lengths {len(modalities)}, {len(vocab_sizes)}, {len(max_seq_lens)}",
            remedy="Give every modality a vocabulary size and a sequence length.",
        )
    for modality, size in zip(modalities, vocab_sizes, strict=True):
        if not 1 <= size <= MAX_VOCAB:
            raise data_error(
                f"vocab_sizes ({modality})",
                expected=f"1 to {MAX_VOCAB}, since rows are 16-bit",
                actual=size,
                remedy="Use a smaller vocabulary.",
            )
    if is_packed(root):
        return TokenStore(*open_rows(root, split, modalities, vocab_sizes, max_seq_lens, cache_dir))
    pids = find_pids(root, split, modalities)
    files, stamp = _survey(root, split, modalities, pids)
    index_path = _index_path(root, split, modalities, max_seq_lens, cache_dir)
    folder = index_path.parent
    index = _read_index(index_path, stamp, len(pids), max_seq_lens)
    if index is None:
        _make_cache_folder(folder)
        with locked(folder / f".{index_path.stem}.lock", str(folder)):
            # Another process may have built it meanwhile.
            index = _read_index(index_path, stamp, len(pids), max_seq_lens)
            if index is None:
                index = _build(root, split, index_path, files, pids, modalities, max_seq_lens, vocab_sizes, stamp)
    for note in index.get("notes", ()):  # what was assumed, whenever it is relied on
        _log.info("%s", note)
    for modality, size, (largest, row) in zip(modalities, vocab_sizes, index["largest"], strict=True):
        if largest >= size:
            raise data_error(
                files[modality][row],
                expected=f"tokens below {size} (vocab_sizes of {modality})",
                actual=largest,
                remedy="Raise the vocabulary size, or prepare the data with the tokenizer that it was set for.",
            )
    tokens = np.memmap(folder / index["data"], dtype=np.uint16, mode="r", shape=(len(pids), sum(max_seq_lens)))
    return TokenStore(tokens=tokens, fingerprint=index["fingerprint"], pids=tuple(pids))


def is_at_hand(
    root: str | os.PathLike,
    split: str,
    modalities: Sequence[str],
    max_seq_lens: Sequence[int],
    cache_dir: str | os.PathLike | None = None,
) -> bool:
    """Whether `open_store` would find the store of a split as it needs it, and write nothing. Raises as it does.

    Never of a packed data set, since opening one notes there what was checked.
    """
    root, modalities = Path(root), list(modalities)
    if is_packed(root):
        return False
    pids = find_pids(root, split, modalities)
    _, stamp = _survey(root, split, modalities, pids)
    return (
        _read_index(_index_path(root, split, modalities, max_seq_lens, cache_dir), stamp, len(pids), max_seq_lens)
        is not None
    )


def _index_path(
    root: Path,
    split: str,
    modalities: list[str],
    max_seq_lens: Sequence[int],
    cache_dir: str | os.PathLike | None,
) -> Path:
    """Where the index of a split lies; the packed rows are beside it."""
    layout = hashlib.sha256(json.dumps([_VERSION, modalities, list(max_seq_lens)]).encode())
    if cache_dir is None:
        folder = root / ".cache"
    else:
        folder = Path(cache_dir)
        layout.update(os.fsencode(root.resolve()))
    return folder / f"{split}-{layout.hexdigest()[:16]}.json"


def _survey(root: Path, split: str, modalities: list[str], pids: list[str]) -> tuple[dict[str, list[str]], FileStamp]:
    """Every token file in row order, and the stamp of all."""
    stamp = FileStamp()
    files: dict[str, list[str]] = {}
    for modality in modalities:
        base = root / split / modality
        files[modality] = []
        for pid in pids:
            entry = token_file(base / pid)
            files[modality].append(entry.path)
            stamp.add(f"{modality}/{pid}/{entry.name}", entry.stat())
    return files, stamp


def _read_index(path: Path, stamp: FileStamp, samples: int, max_seq_lens: Sequence[int]) -> dict | None:
    """The index of a cache that is whole and up to date, else None."""
    try:
        index = json.loads(path.read_text())
        current = index["stamp"] == stamp.hexdigest() and {"fingerprint", "largest"} <= index.keys()
        whole = (path.parent / index["data"]).stat().st_size == 2 * samples * sum(max_seq_lens)
        for largest, row in index["largest"]:
            whole = whole and isinstance(largest, int) and row in range(samples)
        whole = whole and len(index["largest"]) == len(max_seq_lens)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:  # not UTF-8, not JSON, not our keys
        _log.warning("%s is damaged (%s); building it anew", path, error)
        return None
    return index if current and whole else None


def _make_cache_folder(folder: Path) -> None:
    try:
        writable_folder(folder)
    except DataError as error:
        raise data_error(
            folder,
            expected="a folder that can be written to, for the packed store",
            actual="one that cannot",
            remedy="Set data.cache_dir to a folder of your own.",
        ) from error


def _build(
    root: Path,
    split: str,
    index_path: Path,
    files: dict[str, list[str]],
    pids: list[str],
    modalities: list[str],
    max_seq_lens: list[int],
    vocab_sizes: list[int],
    stamp: FileStamp,
) -> dict:
    folder = index_path.parent
    if index_path.exists():
        _log.info("%s is out of date; building it anew", index_path)
    stamp.settle()
    packed = np.empty((len(pids), sum(max_seq_lens)), dtype=np.uint16)
    largest = []
    assumptions: list[str] = []
    start = 0
    for modality, length, vocab_size in zip(modalities, max_seq_lens, vocab_sizes, strict=True):
        read = read_packable(root, modality, files[modality], length, vocab_size)
        rows = read.rows
        assumptions += [f"{modality}: {note}" for note in read.said()]
        largest.append(read.largest())
        packed[:, start : start + length] = rows
        start += length
    if _survey(root, split, modalities, pids)[1].hexdigest() != stamp.hexdigest():
        raise data_error(
            root / split,
            expected="token files that stay as they are while they are packed",
            actual="some that were written to meanwhile",
            remedy="Run this again once whatever writes there has finished.",
        )
    fingerprint = fingerprint_of(modalities, max_seq_lens, pids, packed)
    data = f"{index_path.stem}-{fingerprint[:16]}.u16"
    index = {
        "stamp": stamp.hexdigest(),
        "fingerprint": fingerprint,
        "data": data,
        "largest": largest,
        "notes": assumptions,
    }
    write_atomically(folder / data, packed.tobytes())
    write_atomically(index_path, json.dumps(index).encode())
    for old in folder.glob(f"{index_path.stem}-*.u16"):
        if old.name != data:
            old.unlink(missing_ok=True)
    _log.info("packed %d samples into %s", len(pids), folder / data)
    return index
