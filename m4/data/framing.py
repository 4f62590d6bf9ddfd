"""One geometry for pixels and joints: every frame is cut to 256x256 by a single axis-aligned affine map.

Pillow resamples a *continuous* source box straight to 256x256, so the picture undergoes exactly the affine map that the
joints get, whatever the parity of the frame's size; there is no intermediate image whose size had to be rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from m4.errors import data_error
from m4.modalities import CANVAS

FRAMINGS = ("subject", "center", "squash")


@dataclass(frozen=True)
class Framing:
    """A source window (left, top, right, bottom), continuous pixel coordinates of a frame of ``size`` (height, width).

    ``scale`` and ``offset``, float32 (2,) in x, y order, take continuous pixel coordinates to canvas coordinates in
    [0, 256]: they are the arguments of that name of ``m4kernels.quantize_coords``.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]

    @property
    def scale(self) -> np.ndarray:
        left, top, right, bottom = self.box
        return np.array([CANVAS / (right - left), CANVAS / (bottom - top)], dtype=np.float32)

    @property
    def offset(self) -> np.ndarray:
        left, top, right, bottom = self.box
        return np.array([-left * CANVAS / (right - left), -top * CANVAS / (bottom - top)], dtype=np.float32)

    def apply_image(self, image: Image.Image) -> Image.Image:
        """The window of ``image`` as a 256x256 image of the same mode (bicubic, antialiased when shrinking)."""
        height, width = self.size
        if image.size != (width, height):
            raise data_error(
                "image",
                expected=f"{width}x{height} pixels, the size this framing was made for",
                actual=f"{image.size[0]}x{image.size[1]}",
                remedy="Make the framing with frame_for(size of this image, …).",
            )
        return image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC, box=self.box)


def frame_for(
    size: tuple[int, int], x: np.ndarray, y: np.ndarray, visible: np.ndarray, mode: str = "subject"
) -> Framing:
    """The 256x256 window for a frame of ``size`` (height, width) whose joints are x, y, visible (J,), MATLAB pixels.

    ``squash`` takes the whole frame, each axis with its own scale. ``center`` and ``subject`` scale the shorter side to
    256 and slide a square window along the longer one: to the middle, or to the middle of the extent of the visible
    joints that lie inside the frame, kept inside the frame. A frame without any such joint is framed in the middle.
    Raises DataError for an unknown mode, an empty size, or x, y, visible of different shapes.
    """
    if mode not in FRAMINGS:
        raise data_error("framing", expected=" or ".join(FRAMINGS), actual=repr(mode), remedy="Choose one of these.")
    height, width = (int(side) for side in size)
    if height < 1 or width < 1:
        raise data_error(
            "size", expected="(height, width) of at least one pixel", actual=size, remedy="Check the frame."
        )
    x, y, visible = np.asarray(x, np.float64), np.asarray(y, np.float64), np.asarray(visible, bool)
    if x.ndim != 1 or x.shape != y.shape or x.shape != visible.shape:
        raise data_error(
            "x, y, visible",
            expected="three arrays of one shape (J,)",
            actual=f"{x.shape}, {y.shape}, {visible.shape}",
            remedy="Pass the joints of a single frame.",
        )
    if mode == "squash":
        return Framing((height, width), (0.0, 0.0, float(width), float(height)))
    side = min(height, width)
    center_x, center_y = width / 2, height / 2
    if mode == "subject":
        cx, cy = x - 0.5, y - 0.5
        inside = visible & (cx >= 0) & (cx <= width) & (cy >= 0) & (cy <= height)
        if inside.any():
            center_x = (cx[inside].min() + cx[inside].max()) / 2
            center_y = (cy[inside].min() + cy[inside].max()) / 2
    left = min(max(center_x - side / 2, 0.0), float(width - side))
    top = min(max(center_y - side / 2, 0.0), float(height - side))
    return Framing((height, width), (float(left), float(top), float(left + side), float(top + side)))
