"""What is filled in: prepared samples, or a picture of the user's own, with or without a pose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4.data.frames import read_frame
from m4.data.framing import frame_for
from m4.data.store import TokenStore
from m4.data.tokenizers import ImageTokenizer
from m4.errors import ConfigError, data_error
from m4.modalities import JOINTS, REFERENCE, RowLayout, data_vocab_size
from m4kernels import quantize_coords

_POSE_KEYS = ("x", "y", "visibility")


@dataclass(frozen=True)
class Inputs:
    """Rows to fill in.

    names: of the N samples. ids: int64 (N,), decide what is drawn. tokens: uint16 (N, L). rows: int64 (N,), where in
    the split; None where they are no prepared samples, and nothing is known of the truth.
    """

    names: Sequence[str]
    ids: Tensor
    tokens: np.ndarray
    rows: np.ndarray | None

    @classmethod
    def of_split(cls, store: TokenStore, rows: np.ndarray) -> Inputs:
        """Samples of a split; the id of each is its row."""
        names = [store.pids[row] for row in rows.tolist()]
        return cls(names, torch.from_numpy(rows), np.asarray(store.tokens[rows]), rows)

    def batch(self, some: slice = slice(None)) -> Tensor:
        """int64 (B, L)"""
        return row_tensor(self.tokens[some])


def row_tensor(rows: np.ndarray) -> Tensor:
    """Rows of tokens, uint16, as int64."""
    return torch.from_numpy(rows.astype(np.int64))


def row_array(rows: Tensor) -> np.ndarray:
    """Rows of tokens as they are kept, uint16: all vocabularies fit."""
    return rows.cpu().numpy().astype(np.uint16)


def spread_rows(store: TokenStore, samples: int, split: str, among: np.ndarray | None = None) -> np.ndarray:
    """int64 rows of a split, evenly spaced among some; default all. Raises ConfigError if the split holds fewer."""
    if samples > len(store):
        raise ConfigError(f"--samples: expected 1 … {len(store)}, as many as the split {split} holds, got {samples}")
    rows = np.arange(len(store)) if among is None else among
    return rows[np.unique(np.linspace(0, len(rows) - 1, samples).round().astype(np.int64))]


def rows_of(store: TokenStore, pids: Sequence[str], split: str) -> np.ndarray:
    """int64 rows of the samples of these names. Raises ConfigError for one that the split does not have."""
    wanted = set(pids)
    found = {pid: row for row, pid in enumerate(store.pids) if pid in wanted}
    for pid in pids:
        if pid not in found:
            some = ", ".join(islice(store.pids, 3))
            raise ConfigError(f"--pids: expected samples of the split {split}, such as {some}, got {pid!r}")
    return np.array([found[pid] for pid in pids], dtype=np.int64)


def picture_inputs(
    layout: RowLayout, meta: dict[str, Any], tokenizer: ImageTokenizer, image: Path, pose: Path | None
) -> Inputs:
    """A picture, cut and tokenised as the data was, and a pose in it, as a row of which nothing else is known.

    Args:
        image: a picture file.
        pose: a JSON file, see `read_pose`.
    Raises:
        DataError: the picture or the pose cannot be read.
        ConfigError: it has ids that the run does not know.
    """
    picture = read_frame(image)
    x, y, visible = (np.zeros(0), np.zeros(0), np.zeros(0, bool)) if pose is None else read_pose(pose)
    size = picture.size[1], picture.size[0]
    framing = frame_for(size, x, y, visible, meta["options"].get("framing", "subject"))
    row = torch.zeros(1, layout.length, dtype=torch.int64)
    name, joints = REFERENCE
    grid = tokenizer.encode(np.asarray(framing.apply_image(picture))[None])
    row[0, layout.span(name)] = torch.from_numpy(np.asarray(grid, np.int64)).flatten()
    if pose is not None:
        pixels = torch.from_numpy(np.stack([x, y], axis=-1).astype(np.float32)) - 0.5  # MATLAB's to continuous
        scale, offset = torch.from_numpy(framing.scale), torch.from_numpy(framing.offset)
        bins = data_vocab_size(joints, meta)
        row[0, layout.span(joints)] = quantize_coords(pixels, torch.from_numpy(visible), scale, offset, bins=bins)
    for modality, span, known in zip(layout.modalities, layout.spans, layout.vocab_sizes, strict=True):
        largest = int(row[0, span].max())
        if largest >= known:
            raise ConfigError(
                f"--image: the run knows {known} ids of {modality}, {image} has {largest}; it was trained on data of "
                "another tokenizer or other bins"
            )
    return Inputs([image.name], torch.zeros(1, dtype=torch.int64), row_array(row), None)


def read_pose(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y float64 (13,) and visible bool (13,) from JSON: {"x": […], "y": […], "visibility": […]}.

    As in a label of Penn Action: the joints of `m4.modalities.JOINTS` in this order, in pixels of the picture, whose
    first pixel is centred on 1; visibility 0 or 1. Raises DataError.
    """
    expected = f'{{"x": […], "y": […], "visibility": […]}} with {len(JOINTS)} numbers each'
    remedy = f"The joints are {', '.join(JOINTS)}; visibility is 0 or 1."
    try:
        pose = json.loads(path.read_bytes())
        x, y, visibility = (np.array(pose[key], dtype=np.float64) for key in _POSE_KEYS)
    except OSError as error:
        raise data_error(path, expected=expected, actual=error.strerror or "no file", remedy=remedy) from error
    except KeyError as error:
        raise data_error(path, expected=expected, actual=f"no {error}", remedy=remedy) from error
    except (TypeError, ValueError) as error:  # not JSON, not UTF-8, no numbers
        raise data_error(path, expected=expected, actual=str(error), remedy=remedy) from error
    shapes = {array.shape for array in (x, y, visibility)}
    if shapes != {(len(JOINTS),)}:
        actual = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise data_error(path, expected=expected, actual=f"arrays of shape {actual}", remedy=remedy)
    if not np.isin(visibility, (0, 1)).all():
        raise data_error(path, expected="visibility 0 or 1", actual=str(visibility.tolist()), remedy=remedy)
    return x, y, visibility == 1
