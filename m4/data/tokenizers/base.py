"""What every image tokenizer does, and the checks they share."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from m4.errors import data_error
from m4.modalities import CANVAS, IMAGE_CODES, IMAGE_GRID

IMAGE_SIZE, GRID, VOCAB_SIZE = CANVAS, IMAGE_GRID, IMAGE_CODES


class ImageTokenizer(Protocol):
    """Turns pictures into grids of ids. ``id`` names the tokenizer and its version in a data set's meta.json."""

    id: str
    vocab_size: int

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, 256, 256, 3) RGB → int64 (B, 16, 16), every id in [0, vocab_size)."""

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Integer (B, 16, 16) → uint8 (B, 256, 256, 3) RGB."""


def check_images(images: np.ndarray) -> np.ndarray:
    """``images`` as an array, or DataError unless it is uint8 (B, 256, 256, 3)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise data_error(
            "images",
            expected=f"uint8 (B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3)",
            actual=f"{images.dtype} {images.shape}",
            remedy="Frame the pictures first (m4.data.framing).",
        )
    return images


def check_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """``tokens`` as int64, or DataError unless integers (B, 16, 16) in [0, vocab_size)."""
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 3 or tokens.shape[1:] != (GRID, GRID):
        raise data_error(
            "tokens",
            expected=f"integers (B, {GRID}, {GRID})",
            actual=f"{tokens.dtype} {tokens.shape}",
            remedy="Pass whole token grids.",
        )
    tokens = tokens.astype(np.int64)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        worst = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise data_error(
            "tokens",
            expected=f"ids in [0, {vocab_size})",
            actual=worst,
            remedy="Leave out ids beyond the tokenizer's vocabulary (mask those logits).",
        )
    return tokens
