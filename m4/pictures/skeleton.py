"""Pictures for people: skeletons on frames, contact sheets, predictions beside the truth. Pillow only."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

# Pairs of the 13 Penn Action joints (head, l/r shoulder, elbow, wrist, hip, knee, ankle), and their colour.
_LEFT, _RIGHT, _MIDDLE = (70, 170, 255), (255, 120, 70), (120, 230, 120)
BONES = (
    (1, 2, _MIDDLE),
    (7, 8, _MIDDLE),
    (1, 7, _LEFT),
    (2, 8, _RIGHT),
    (1, 3, _LEFT),
    (3, 5, _LEFT),
    (2, 4, _RIGHT),
    (4, 6, _RIGHT),
    (7, 9, _LEFT),
    (9, 11, _LEFT),
    (8, 10, _RIGHT),
    (10, 12, _RIGHT),
)
_SUPERSAMPLE = 2

Picture = np.ndarray | Image.Image
Pose = tuple[np.ndarray, np.ndarray]  # xy (13, 2) pixels of the picture, visible (13,)


def draw_skeleton(image: Picture, xy: np.ndarray, visible: np.ndarray) -> Image.Image:
    """A copy of ``image`` (uint8 (H, W, 3) or PIL) with the visible joints and the bones between them.

    xy (13, 2): continuous pixel coordinates of the picture; visible bool (13,). Left is blue, right orange.
    """
    picture = as_picture(image)
    xy, visible = np.asarray(xy, np.float64), np.asarray(visible, bool)
    if xy.shape != (13, 2) or visible.shape != (13,):
        raise ValueError(f"draw_skeleton: expected xy (13, 2) and visible (13,), got {xy.shape} and {visible.shape}")
    size = picture.size
    large = picture.resize((size[0] * _SUPERSAMPLE, size[1] * _SUPERSAMPLE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(large)
    points = xy * _SUPERSAMPLE - 0.5
    width = max(2, round(max(size) / 110)) * _SUPERSAMPLE
    for a, b, color in BONES:
        if visible[a] and visible[b]:
            draw.line([tuple(points[a]), tuple(points[b])], fill=color, width=width)
    if visible[[0, 1, 2]].all():
        draw.line([tuple(points[0]), tuple((points[1] + points[2]) / 2)], fill=_MIDDLE, width=width)
    for joint in range(13):
        if visible[joint]:
            x, y = points[joint]
            color = _MIDDLE if joint == 0 else _LEFT if joint % 2 else _RIGHT
            radius = width * (1.5 if joint == 0 else 0.9)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))
            draw.ellipse((x - radius * 0.6, y - radius * 0.6, x + radius * 0.6, y + radius * 0.6), fill=color)
    return large.reduce(_SUPERSAMPLE)


def as_picture(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"expected a uint8 (H, W, 3) picture, got {array.dtype} {array.shape}")
    return Image.fromarray(array)
