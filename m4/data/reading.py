"""Reading token files that others may have made: what is accepted, with what was assumed, and what is refused.

Joints (`m4.modalities`) are three rows, x, y, visibility, of 8,192 bins over the 256-pixel canvas. Data of the M3
notebook's rules, or of other orders and units, would train a model without a word of complaint; what their shapes and
values give away is refused here. What they do not give away is said: without a meta.json nothing tells whether pixels
and joints were cut by the same window.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m4.data.layout import read_meta
from m4.data.progress import shown
from m4.errors import DataError, data_error
from m4.modalities import BINS, CANVAS, Modality, data_vocab_size, modality_of

MAX_VOCAB = 2**16  # rows are 16-bit
_BAD_TOKENS = "Prepare this sample again: python -m m4.data prepare."
_OLD_RULES = "Prepare the data again from the videos: python -m m4.data prepare."
# So many visible joints that all of them within the first 256 of 8,192 bins cannot be chance.
_ENOUGH_JOINTS = 100


class TokenReader:
    """Reads .npy files of one modality into flat int64 rows; headers seen before are not parsed again.

    Accepted are integers of any width, flat or of any shape, with or without a leading augmentation axis, of which the
    first entry is taken; for joints also floats, fractions of the canvas in [0, 1] with visibility 0 or 1. ``notes``
    says which of these occurred and what was assumed.
    """

    def __init__(self, modality: Modality):
        self.length, self.joints = modality.length, modality.kind == "joints"
        self._shape = modality.shape
        self.notes: dict[str, int] = {}  # assumption → files
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
        if count != self.length:
            self._note("with an augmentation axis; the first entry of each is used")
        elif len(shape) == 1:
            self._note(f"flat; taken as {'rows x, y, visibility' if self.joints else 'row after row'}")
        values = values[: self.length]
        if dtype.kind == "f":
            self._note(f"floats; taken as fractions of the canvas, in {BINS:,} bins")
            return _from_fractions(path, values)
        return values

    def _note(self, assumption: str) -> None:
        self.notes[assumption] = self.notes.get(assumption, 0) + 1

    def _parse(self, path: str | os.PathLike, content: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
        stream = io.BytesIO(content)
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("a version other than 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        except (ValueError, EOFError, SyntaxError, TypeError) as error:
            raise data_error(path, expected="a .npy file of integers", actual=str(error), remedy=_BAD_TOKENS) from error
        if dtype.kind not in ("iubf" if self.joints else "iub"):
            raise data_error(path, expected="integers", actual=f"dtype {dtype}", remedy=_BAD_TOKENS)
        if self.joints:
            self._check_order(path, shape)
        if int(np.prod(shape)) != self.length and (
            len(shape) < 2 or shape[0] < 1 or int(np.prod(shape[1:])) != self.length
        ):
            raise data_error(
                path,
                expected=f"{self.length} tokens, or an augmentation axis before them",
                actual=f"shape {shape}",
                remedy="Correct max_seq_lens, or prepare this sample again.",
            )
        return dtype, shape, fortran

    def _check_order(self, path: str | os.PathLike, shape: tuple[int, ...]) -> None:
        joints = self._shape[1]
        reason = None
        if joints != 3 and shape[-2:] == (joints, 3):
            reason = "joint by joint"
        elif shape[-2:] in ((joints, 2), (2, joints)):
            reason = "without visibility"
        if reason is not None:
            raise data_error(
                path, expected=f"rows x, y, visibility (3, {joints})", actual=f"{shape}, {reason}", remedy=_OLD_RULES
            )


def _from_fractions(path: str | os.PathLike, values: np.ndarray) -> np.ndarray:
    """Float x, y in [0, 1] and visibility to tokens, by the rule of ``m4kernels.quantize_coords``."""
    x, y, visibility = values.astype(np.float64).reshape(3, -1)
    xy = np.stack([x, y])
    if not np.isin(visibility, (0, 1)).all():
        raise data_error(path, expected="visibility 0 or 1", actual=_extremes(visibility), remedy=_OLD_RULES)
    visible = (visibility == 1) & np.isfinite(xy).all(0)
    # A joint may lie outside the frame, but not frames away from it.
    if (np.abs(xy[:, visible] - 0.5) > 1).any():
        raise data_error(
            path,
            expected="float joints in [0, 1], fractions of the canvas",
            actual=f"{_extremes(xy[:, visible])}, perhaps pixels of a frame whose size is not known here",
            remedy=_OLD_RULES,
        )
    visible &= ((xy >= 0) & (xy <= 1)).all(0)
    tokens = np.rint(np.clip(np.nan_to_num(xy, nan=0.0, posinf=0.0, neginf=0.0), 0, 1) * (BINS - 1))
    return np.concatenate([*tokens, visible]).astype(np.int64)


def check_joints(modality: Modality, rows: np.ndarray, paths: Sequence[str], bins: int = BINS) -> list[str]:
    """What must be said about the joints of a split, rows (N, 3·J); DataError for what is of other rules.

    ``bins``: of the data, per axis.
    """
    _, count = modality.shape
    xy, visibility = rows[:, modality.coordinates].reshape(-1, 2, count), rows[:, modality.visibility]
    if visibility.max(initial=0) > 1:
        by_joint = rows.reshape(len(rows), count, 3)
        if by_joint[..., 2].max(initial=0) <= 1:
            raise data_error(
                paths[0],
                expected=f"{modality.name} as rows x, y, visibility",
                actual="every third value 0 or 1: x, y, visibility joint by joint",
                remedy=_OLD_RULES,
            )
        return ["visibility is not 0 or 1 everywhere; taken as tokens that mean nothing else"]
    if xy.max(initial=0) >= bins:
        row = int(xy.reshape(len(rows), -1).max(1).argmax())
        raise data_error(
            paths[row],
            expected=f"joints in bins 0 … {bins - 1}",
            actual=f"{int(xy.max())}, as the M3 rules may give",
            remedy=_OLD_RULES,
        )
    seen = xy.transpose(0, 2, 1)[visibility == 1]
    if len(seen) >= _ENOUGH_JOINTS and 1 < seen.max() <= CANVAS < bins // 4:
        raise data_error(
            paths[0],
            expected=f"joints in {bins:,} bins",
            actual=f"none of {len(seen):,} visible joints beyond {int(seen.max())}: pixels, or fewer bins",
            remedy=_OLD_RULES,
        )
    return []


@dataclass(frozen=True, eq=False)
class ReadRows:
    """The tokens of some files of a modality, int64 (N, length), and what was assumed in reading them.

    notes: assumption → files that it was made of, 0 where it is about all of them.
    """

    rows: np.ndarray
    notes: dict[str, int]

    def said(self) -> list[str]:
        """The notes as lines."""
        return [f"{note} ({files} of {len(self.rows)})" if files else note for note, files in self.notes.items()]

    def largest(self) -> tuple[int, int]:
        """The largest token and its row."""
        row = int(self.rows.max(axis=1).argmax())
        return int(self.rows[row].max()), row


def read_files(root: Path, name: str, paths: Sequence[str], length: int, vocab_size: int = BINS) -> ReadRows:
    """All files of the modality ``name`` of a split.

    Raises DataError for a file that cannot be read, or joints of other rules than ours (judged where the vocabulary
    has room for 8,192 bins).
    """
    modality = modality_of(name, length)
    reader = TokenReader(modality)
    rows = np.stack([reader.read(path) for path in shown(paths, f"reading {name}", "file")]).astype(np.int64)
    notes = {f"files {assumption}": files for assumption, files in reader.notes.items()}
    if modality.kind == "joints" and vocab_size >= BINS:
        meta = read_meta(root)
        notes |= dict.fromkeys(check_joints(modality, rows, paths, data_vocab_size(name, meta)), 0)
        if not meta:
            notes[
                "no meta.json of python -m m4.data, so nothing says how joints were scaled; taken as sharing the "
                "window of the frames (the M3 notebook's rules displace them: prepare such data again)"
            ] = 0
    return ReadRows(rows, notes)


def read_rows(
    root: Path, name: str, paths: Sequence[str], length: int, vocab_size: int = BINS
) -> tuple[np.ndarray, list[str]]:
    """The rows of `read_files`, and its notes as lines."""
    read = read_files(root, name, paths, length, vocab_size)
    return read.rows, read.said()


def read_packable(root: Path, name: str, paths: Sequence[str], length: int, vocab_size: int = BINS) -> ReadRows:
    """`read_files`, whose tokens fit 16 bits; else DataError."""
    read = read_files(root, name, paths, length, vocab_size)
    low, (most, row) = int(read.rows.min(axis=1).argmin()), read.largest()
    least = int(read.rows[low].min())
    if least < 0 or most >= MAX_VOCAB:
        raise data_error(
            paths[low if least < 0 else row],
            expected=f"tokens in [0, {MAX_VOCAB})",
            actual=least if least < 0 else most,
            remedy=_BAD_TOKENS,
        )
    return read


def _extremes(values: np.ndarray) -> str:
    return f"{values.min():.4g} … {values.max():.4g}"


__all__ = ["DataError", "TokenReader", "check_joints", "read_files", "read_packable", "read_rows"]
