"""How close predicted frames are to the true ones: token by token, and in pixels once both are decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from skimage.metrics import structural_similarity

from m4.modalities import CANVAS, IMAGE_GRID
from m4.poses import Poses, bounding_boxes

MOST_PSNR = 100.0  # dB: of frames that are equal, whose mean over a split would be infinite otherwise
_PADDING = 0.1  # of a person's box, to each side
_DECODED_AT_ONCE = 16

Box = tuple[slice, slice]  # rows, columns
Decode = Callable[[np.ndarray], np.ndarray]  # of an image tokenizer


def person_boxes(poses: Poses) -> list[Box | None]:
    """Where each person is: the pixels that the bounding box of the visible joints touches, padded by a tenth of its
    size to each side; None without a visible joint."""
    boxes: list[Box | None] = []
    for low, high in zip(*bounding_boxes(poses), strict=True):
        if not np.isfinite(low).all():
            boxes.append(None)
            continue
        margin = _PADDING * (high - low)
        first = np.floor(low - margin).clip(0, CANVAS - 1).astype(int)
        last = np.ceil(high + margin).clip(first + 1, CANVAS).astype(int)
        boxes.append((slice(first[1], last[1]), slice(first[0], last[0])))
    return boxes


def token_accuracy(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Share of the image tokens, integer (N, 256), that are right; None of none."""
    return float((predicted == true).mean()) if predicted.size else None


def pixel_figures(
    predictions: Sequence[np.ndarray],
    true: np.ndarray,
    decode: Decode,
    boxes: Sequence[Box | None] | None = None,
    shown: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[dict[str, Any]]:
    """How close predicted frames are to the true ones once both are decoded.

    Args:
        predictions: of the same frames, integer (N, 256) image tokens each.
        true: integer (N, 256) image tokens.
        decode: tokens (B, 16, 16) → uint8 (B, 256, 256, 3).
        boxes: of N persons, see `person_boxes`; None where nothing says where they are.
        shown: hands on the numbers of the frames, and shows progress.
    Returns:
        of each prediction the means over the frames of psnr (dB, at most MOST_PSNR) and ssim (scikit-image's, of colour
        frames), with boxes also psnr_person, within them; None where there is none.
    """
    found: list[list[_Closeness]] = [[] for _ in predictions]
    # Half of the time is scikit-image's, which leaves Python to other threads while it filters.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for first in shown(range(0, len(true), _DECODED_AT_ONCE)):
            chunk = slice(first, first + _DECODED_AT_ONCE)
            there = _decoded(true[chunk], decode)
            inside = [None] * len(there) if boxes is None else boxes[chunk]
            begun = [pool.map(_closeness, _decoded(tokens[chunk], decode), there, inside) for tokens in predictions]
            for of_one, done in zip(found, begun, strict=True):
                of_one.extend(done)
    return [_means(of_one, boxes is not None) for of_one in found]


class _Closeness(NamedTuple):
    """Of a frame to the true one."""

    psnr: float
    ssim: float
    psnr_person: float | None


def _closeness(a: np.ndarray, b: np.ndarray, box: Box | None) -> _Closeness:
    ssim = float(structural_similarity(a, b, data_range=255, channel_axis=2))
    person = None if box is None else peak_signal_noise_ratio(a[box], b[box])
    return _Closeness(peak_signal_noise_ratio(a, b), ssim, person)


def _means(frames: list[_Closeness], of_persons: bool) -> dict[str, Any]:
    figures = {"psnr": _mean([frame.psnr for frame in frames]), "ssim": _mean([frame.ssim for frame in frames])}
    if of_persons:
        figures["psnr_person"] = _mean([frame.psnr_person for frame in frames if frame.psnr_person is not None])
    return figures


def peak_signal_noise_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """dB, of uint8 arrays of one shape; at most MOST_PSNR."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return MOST_PSNR if error == 0 else min(MOST_PSNR, float(10 * np.log10(255**2 / error)))


def _decoded(tokens: np.ndarray, decode: Decode) -> np.ndarray:
    return decode(tokens.reshape(-1, IMAGE_GRID, IMAGE_GRID))


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
