"""Pictures in rows: contact sheets, and predictions beside the truth."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m4.pictures.skeleton import Picture, as_picture, draw_skeleton

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".pdf")
_GAP, _TITLE, _PAPER, _INK = 6, 22, (250, 250, 248), (30, 30, 34)
_SIDE, _EMPTY = 256, (58, 60, 66)  # of a moment without a picture


def contact_sheet(rows: Sequence[Sequence[Picture]], titles: Sequence[str] = (), columns: int = 1) -> Image.Image:
    """Pictures in rows, all of one size; ``columns`` > 1 sets that many rows side by side. titles: over each column."""
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"contact_sheet: expected rows of equally many pictures, got {[len(row) for row in rows]}")
    pictures = [[as_picture(picture) for picture in row] for row in rows]
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
    """A picture, uint8 (H, W, 3), and a pose in its pixels, xy (13, 2), visible (13,); either may be absent.

    A pose without a picture is drawn on an empty one of 256 x 256. caption: drawn on the picture.
    """

    image: np.ndarray | None = None
    xy: np.ndarray | None = None
    visible: np.ndarray | None = None
    caption: str = ""

    def drawn(self) -> Image.Image:
        """The picture with the joints that are visible."""
        image = np.full((_SIDE, _SIDE, 3), _EMPTY, np.uint8) if self.image is None else self.image
        if self.xy is None or self.visible is None:
            picture = as_picture(image)
        else:
            picture = draw_skeleton(image, self.xy, self.visible)
        return captioned(picture, self.caption) if self.caption else picture


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """A copy with a line of text at its foot."""
    picture = picture.copy()
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    left, top, right, bottom = draw.textbbox((4, 0), text, font=font)
    foot = picture.size[1] - (bottom - top) - 7
    draw.rectangle((0, foot, right + 4, picture.size[1]), fill=_PAPER)
    draw.text((left, foot + 3 - top), text, fill=_INK, font=font)
    return picture


def moment_sheet(rows: Sequence[Sequence[Moment]], titles: Sequence[str] = ()) -> Image.Image:
    """Moments in rows, with titles over the columns."""
    return contact_sheet([[moment.drawn() for moment in row] for row in rows], titles)


def picture_endings() -> tuple[str, ...]:
    """Endings of the files that `picture_bytes` can make here."""
    kinds = Image.registered_extensions()
    return tuple(ending for ending in _ENDINGS if kinds.get(ending) in Image.SAVE)


def picture_bytes(picture: Image.Image, ending: str) -> bytes:
    """The content of a picture file with this ending, for example ".png"."""
    buffer = io.BytesIO()
    picture.save(buffer, Image.registered_extensions()[ending.lower()])
    return buffer.getvalue()
