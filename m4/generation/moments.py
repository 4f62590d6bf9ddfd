"""Rows of tokens as pictures: moments with what is known of them, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from m4.data.tokenizers import ImageTokenizer
from m4.errors import ConfigError
from m4.modalities import NEXT, REFERENCE, TABLE, RowLayout, data_vocab_size
from m4.pictures.sheets import Moment
from m4kernels import dequantize_coords

_AT_ONCE = 16  # images that are decoded together
MOMENTS = {"reference": REFERENCE, "next": NEXT}
IMAGES = tuple(names[0] for names in MOMENTS.values())


def check_drawable(layout: RowLayout, names: Sequence[str], run: object) -> None:
    """Raise ConfigError unless something of these modalities can be drawn, and what can be is whole."""
    drawable = [name for name in names if name in TABLE]
    if not drawable:
        raise ConfigError(
            f"--out: nothing of {', '.join(names)} can be drawn; take a file that ends in .npz, which holds the tokens"
        )
    for name in drawable:
        if layout[name] != TABLE[name]:
            raise ConfigError(
                f"--run: {run} has {layout[name].length} tokens of {name} a sample, a picture needs "
                f"{TABLE[name].length}; take a file that ends in .npz, which holds the tokens"
            )


@dataclass(frozen=True)
class Painter:
    """Makes moments of rows.

    tokenizer: of the images; None if there are none.
    """

    layout: RowLayout
    meta: Mapping[str, Any]
    tokenizer: ImageTokenizer | None

    def moments(self, tokens: Tensor, names: Sequence[str], captions: Sequence[str] = ()) -> list[Moment]:
        """A moment for each row of tokens (int64 (B, L)), with what it holds of the modalities ``names`` of a moment,
        of images and of joints one at most."""
        moments = [Moment(caption=caption) for caption in captions or [""] * len(tokens)]
        for name in names:
            part = tokens[:, self.layout.span(name)].cpu()
            if TABLE[name].kind == "joints":
                xy, visible = self.poses(tokens, name)
                found = [{"xy": a, "visible": b} for a, b in zip(xy, visible, strict=True)]
            else:
                assert self.tokenizer is not None
                grids = part.unflatten(1, TABLE[name].shape).numpy()
                batches = [grids[first : first + _AT_ONCE] for first in range(0, len(grids), _AT_ONCE)]
                found = [{"image": image} for grid in batches for image in self.tokenizer.decode(grid)]
            moments = [replace(moment, **fields) for moment, fields in zip(moments, found, strict=True)]
        return moments

    def poses(self, tokens: Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
        """xy float32 (B, 13, 2), pixels of the canvas, and visible bool (B, 13), of rows of tokens (int64 (B, L))."""
        part = tokens[:, self.layout.span(name)].cpu().contiguous()
        xy, visible = dequantize_coords(part, bins=data_vocab_size(name, self.meta))
        return xy.numpy(), visible.numpy()


def shifted(image: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) moved by ``shift`` (x, y) pixels, to whole ones; what comes in at the edge is grey."""
    right, down = (round(float(value)) for value in shift)
    height, width = image.shape[:2]
    moved = np.full_like(image, 128)
    if abs(right) < width and abs(down) < height:
        part = image[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
        moved[max(0, down) : max(0, down) + part.shape[0], max(0, right) : max(0, right) + part.shape[1]] = part
    return moved
