"""Pictures for people: skeletons on frames, contact sheets, predictions beside the truth. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
_GAP, _TITLE, _PAPER, _INK = 6, 22, (250, 250, 248), (30, 30, 34)

Picture = np.ndarray | Image.Image
Pose = tuple[np.ndarray, np.ndarray]  # xy (13, 2) pixels of the picture, visible (13,)


def draw_skeleton(image: Picture, xy: np.ndarray, visible: np.ndarray) -> Image.Image:
    """A copy of ``image`` (uint8 (H, W, 3) or PIL) with the visible joints and the bones between them.

    xy (13, 2): continuous pixel coordinates of the picture; visible bool (13,). Left is blue, right orange.
    """
    picture = _picture(image)
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


def contact_sheet(rows: Sequence[Sequence[Picture]], titles: Sequence[str] = (), columns: int = 1) -> Image.Image:
    """Pictures in rows, all of one size; ``columns`` > 1 sets that many rows side by side. titles: over each column."""
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"contact_sheet: expected rows of equally many pictures, got {[len(row) for row in rows]}")
    pictures = [[_picture(picture) for picture in row] for row in rows]
    width, height = pictures[0][0].size
    across = len(rows[0])
    lines = -(-len(rows) // columns)
    block = across * (width + _GAP) + _GAP
    top = _TITLE if titles else 0
    sheet = Image.new("RGB", (columns * block + (columns - 1) * _GAP, top + lines * (height + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for column in range(columns):
        left = column * (block + _GAP) + _GAP
        for index, title in enumerate(titles):
            draw.text((left + index * (width + _GAP) + 2, 4), title, fill=_INK, font=font)
    for number, row in enumerate(pictures):
        left = (number // lines) * (block + _GAP) + _GAP
        for index, picture in enumerate(row):
            place = left + index * (width + _GAP), top + _GAP + (number % lines) * (height + _GAP)
            sheet.paste(picture.resize((width, height)) if picture.size != (width, height) else picture, place)
    return sheet


@dataclass(frozen=True, eq=False)
class Moment:
    """A picture, uint8 (H, W, 3), with a pose in its pixels: xy (13, 2), visible (13,)."""

    image: np.ndarray
    xy: np.ndarray
    visible: np.ndarray

    def drawn(self) -> Image.Image:
        return draw_skeleton(self.image, self.xy, self.visible)


def prediction_panel(
    rows: Sequence[tuple[Moment, Moment, Moment]],
    titles: Sequence[str] = ("reference", "true next", "predicted next"),
) -> Image.Image:
    """One labelled picture: each row shows (reference, true next, predicted next) with their skeletons."""
    return contact_sheet([[moment.drawn() for moment in row] for row in rows], titles)


def _picture(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"expected a uint8 (H, W, 3) picture, got {array.dtype} {array.shape}")
    return Image.fromarray(array)
