"""Which frames make a pair: a reference and the first later frame that looks different enough.

Walk a video from its first frame as reference. The next frame whose grayscale SSIM with the reference is at most the
threshold is its successor, and the next reference. SSIM is scikit-image's (Wang et al., 2004: 7x7 uniform window,
data_range 255) over the full frame; the local sums of the reference are kept from frame to frame, and a value too near
the threshold for single precision is settled by scikit-image itself, so the decisions are exactly its decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from scipy.ndimage import uniform_filter
from skimage.metrics import structural_similarity

from m4.data.errors import data_error

SSIM_THRESHOLD = 0.89
_WINDOW = 7
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Single precision stays within 1e-6 of scikit-image on natural frames.
_UNSURE = 1e-4


def find_pairs(frames: Iterable[np.ndarray], threshold: float = SSIM_THRESHOLD) -> Iterator[tuple[int, int]]:
    """Yield (reference, successor) frame numbers, counted from 0, of grayscale uint8 frames (H, W) of one size.

    Raises DataError for a threshold outside (-1, 1], a frame of another size, or frames smaller than the SSIM window.
    """
    if not -1 < threshold <= 1:
        raise data_error("ssim_threshold", expected="a number in (-1, 1]", actual=threshold, remedy="Correct it.")
    reference: _LocalSums | None = None
    reference_number = 0
    for number, frame in enumerate(frames):
        if min(frame.shape) < _WINDOW:
            raise data_error(
                f"frame {number + 1}",
                expected=f"at least {_WINDOW}x{_WINDOW} pixels for SSIM",
                actual=f"{frame.shape[1]}x{frame.shape[0]}",
                remedy="Leave this video out.",
            )
        current = _LocalSums(frame)
        if reference is None:
            reference = current
            continue
        if frame.shape != reference.frame.shape:
            raise data_error(
                f"frame {number + 1}",
                expected=f"the size of the frames before, {reference.frame.shape[1]}x{reference.frame.shape[0]}",
                actual=f"{frame.shape[1]}x{frame.shape[0]}",
                remedy="All frames of a video must be of one size.",
            )
        similarity = _ssim(reference, current)
        if abs(similarity - threshold) < _UNSURE:
            similarity = structural_similarity(reference.frame, frame, data_range=255)
        if similarity <= threshold:
            yield reference_number, number
            reference, reference_number = current, number


class _LocalSums:
    """A frame with the means of its values and of their squares over every 7x7 window, float32 (H, W)."""

    def __init__(self, frame: np.ndarray):
        self.frame = frame
        # Centred values lose less precision when squared.
        self.values = frame.astype(np.float32) - 128.0
        self.mean = uniform_filter(self.values, _WINDOW)
        self.square = uniform_filter(self.values * self.values, _WINDOW)


def _ssim(a: _LocalSums, b: _LocalSums) -> float:
    sample = _WINDOW**2 / (_WINDOW**2 - 1)  # scikit-image's unbiased variances
    product = uniform_filter(a.values * b.values, _WINDOW)
    ma, mb = a.mean, b.mean
    covariance = sample * (product - ma * mb)
    variances = sample * (a.square - ma * ma + b.square - mb * mb)
    ua, ub = ma + 128.0, mb + 128.0
    top = (2 * ua * ub + _C1) * (2 * covariance + _C2)
    bottom = (ua * ua + ub * ub + _C1) * (variances + _C2)
    edge = _WINDOW // 2
    return float((top / bottom)[edge:-edge, edge:-edge].mean(dtype=np.float64))
