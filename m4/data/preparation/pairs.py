"""Which frames make a pair: a reference and the first later frame that looks different enough.

Walk a video from its first frame as reference. The next frame whose grayscale SSIM with the reference is at most the
threshold is its successor, and the next reference. Grayscale is Pillow's ``convert("L")`` of the decoded RGB frame, at
full size; SSIM is scikit-image's, and the decisions are exactly its decisions (see `m4.data.preparation.ssim`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from m4.data.preparation.ssim import WINDOW, GrayFrame, at_most
from m4.errors import data_error

SSIM_THRESHOLD = 0.89


def find_pairs(frames: Iterable[np.ndarray], threshold: float = SSIM_THRESHOLD) -> Iterator[tuple[int, int]]:
    """Yield (reference, successor) frame numbers, counted from 0, of grayscale uint8 frames (H, W) of one size.

    Raises DataError for a threshold outside (-1, 1], a frame of another size, or frames smaller than the SSIM window,
    or a frame that is not grayscale of 8 bits.
    """
    if not -1 < threshold <= 1:
        raise data_error("ssim_threshold", expected="a number in (-1, 1]", actual=threshold, remedy="Correct it.")
    reference: GrayFrame | None = None
    reference_number = 0
    for number, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 2:
            raise data_error(
                f"frame {number + 1}",
                expected="a grayscale frame, uint8 (H, W)",
                actual=f"{frame.dtype} {frame.shape}",
                remedy='Convert it: np.asarray(image.convert("L")).',
            )
        if min(frame.shape) < WINDOW:
            raise data_error(
                f"frame {number + 1}",
                expected=f"at least {WINDOW}x{WINDOW} pixels for SSIM",
                actual=f"{frame.shape[1]}x{frame.shape[0]}",
                remedy="Leave this video out.",
            )
        current = GrayFrame(frame)
        if reference is None:
            reference = current
            continue
        if frame.shape != reference.pixels.shape:
            raise data_error(
                f"frame {number + 1}",
                expected=f"the size of the frames before, {reference.pixels.shape[1]}x{reference.pixels.shape[0]}",
                actual=f"{frame.shape[1]}x{frame.shape[0]}",
                remedy="All frames of a video must be of one size.",
            )
        if at_most(reference, current, threshold):
            yield reference_number, number
            reference, reference_number = current, number
