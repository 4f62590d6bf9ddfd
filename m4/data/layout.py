"""The token layout on disk: ``{root}/{split}/{modality}/{pid}/{file}``, and reading it into rows."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m4.data.errors import DataError, data_error

SPLITS = ("train", "eval", "test")
_BAD_TOKENS = "Prepare this sample again: python -m m4.data prepare."


def find_splits(root: Path) -> list[str]:
    """The splits present under ``root``. Raises DataError for a root that is missing or holds none."""
    if not root.is_dir():
        raise data_error(
            root,
            expected="a data root",
            actual="no such folder",
            remedy="Check data.root, or set it to null for the embedded sample set.",
        )
    found = [split for split in SPLITS if (root / split).is_dir()]
    if not found:
        raise data_error(
            root,
            expected=f"the folders {', '.join(SPLITS)}",
            actual="none of them",
            remedy="Make the data: python -m m4.data prepare --out ROOT, or python -m m4.data split ROOT.",
        )
    return found


def find_pids(root: Path, split: str, modalities: Sequence[str]) -> list[str]:
    """Sorted sample names of a split, the same for every modality. Raises DataError naming what is missing."""
    splits = find_splits(root)
    if split not in splits:
        raise data_error(
            root / split,
            expected="a folder of this split",
            actual=f"only {', '.join(splits)}",
            remedy="Split the data: python -m m4.data split ROOT.",
        )
    names: dict[str, set[str]] = {}
    for modality in modalities:
        folder = root / split / modality
        if not folder.is_dir():
            present = sorted(entry.name for entry in (root / split).iterdir() if entry.is_dir())
            raise data_error(
                folder,
                expected="a folder of this modality",
                actual=f"only {', '.join(present) or 'nothing'}",
                remedy="Correct the list of modalities, or prepare the data with this one.",
            )
        with os.scandir(folder) as entries:
            names[modality] = {entry.name for entry in entries if not entry.name.startswith(".")}
    everything = set().union(*names.values())
    if not everything:
        raise data_error(
            root / split,
            expected="samples",
            actual="none",
            remedy="Prepare more data, or split it with other fractions.",
        )
    for modality in modalities:
        lacking = sorted(everything - names[modality])
        if lacking:
            holder = next(other for other in modalities if lacking[0] in names[other])
            raise data_error(
                root / split / modality / lacking[0],
                expected=f"the same samples as in {holder}",
                actual=f"no sample {lacking[0]} ({len(lacking)} of {len(everything)} are missing here)",
                remedy="Prepare the data again, or remove these samples from the other modalities.",
            )
    return sorted(everything)


def token_file(folder: Path) -> os.DirEntry:
    """The single file of a pid folder, whatever its name. Raises DataError for none or several."""
    try:
        with os.scandir(folder) as entries:
            files = [entry for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    except NotADirectoryError:
        files = []
    if len(files) != 1:
        found = ", ".join(sorted(entry.name for entry in files)) or "none"
        raise data_error(folder, expected="a folder with one file", actual=found, remedy=_BAD_TOKENS)
    return files[0]


class TokenReader:
    """Reads .npy token files into flat int64 rows of one length; headers seen before are not parsed again."""

    def __init__(self, length: int):
        self.length = length
        self.augmented = 0  # files with a leading augmentation axis, of which the first entry was taken
        self._headers: dict[bytes, tuple[np.dtype, tuple[int, ...], bool]] = {}

    def read(self, path: str | os.PathLike) -> np.ndarray:
        """The tokens of one file, (length,). Raises DataError naming the file."""
        with open(path, "rb") as file:
            content = file.read()
        header_end = 10 + int.from_bytes(content[8:10], "little")
        header = content[:header_end]
        if header not in self._headers:
            self._headers[header] = self._parse(path, content)
        dtype, shape, fortran = self._headers[header]
        count = int(np.prod(shape))
        if len(content) < header_end + count * dtype.itemsize:
            raise data_error(
                path, expected=f"{count} values of {dtype}", actual=f"{len(content)} bytes", remedy=_BAD_TOKENS
            )
        values = np.frombuffer(content, dtype, count, header_end)
        if fortran:
            values = values.reshape(shape, order="F").ravel()
        return values[: self.length]

    def _parse(self, path: str | os.PathLike, content: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
        stream = io.BytesIO(content)
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("a version other than 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        except (ValueError, EOFError, SyntaxError, TypeError) as error:
            raise data_error(path, expected="a .npy file of integers", actual=str(error), remedy=_BAD_TOKENS) from error
        if dtype.kind not in "iub":
            raise data_error(path, expected="integers", actual=f"dtype {dtype}", remedy=_BAD_TOKENS)
        if int(np.prod(shape)) != self.length:
            if len(shape) < 2 or shape[0] < 1 or int(np.prod(shape[1:])) != self.length:
                raise data_error(
                    path,
                    expected=f"{self.length} tokens, or an augmentation axis before them",
                    actual=f"shape {shape}",
                    remedy="Correct max_seq_lens, or prepare this sample again.",
                )
            self.augmented += 1
        return dtype, shape, fortran


__all__ = ["SPLITS", "DataError", "TokenReader", "find_pids", "find_splits", "token_file"]
