"""Moving pictures."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from PIL import Image

_LAST_LONGER = 3  # times as long the last picture stays, before it begins anew
_LOOKED_AT = 8  # pictures from which the colours are taken


def gif_bytes(frames: Iterable[Image.Image], seconds: float = 0.5) -> bytes:
    """The content of an animated GIF that never ends.

    Args:
        frames: at least one, all of one size.
        seconds: each is shown, in hundredths; the last thrice as long.
    """
    pictures = [frame.convert("RGB") for frame in frames]
    if max(pictures[0].size) >= 2**16:
        raise ValueError(f"gif_bytes: expected at most 65535 pixels a side, got {pictures[0].size}")
    palette = _palette(pictures)
    first, *rest = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    duration = max(1, round(100 * seconds)) * 10
    durations = [duration] * len(rest) + [duration * (_LAST_LONGER if rest else 1)]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0, disposal=1)
    return buffer.getvalue()


def _palette(pictures: list[Image.Image]) -> Image.Image:
    """256 colours for all pictures, so that what stands still keeps its colours; undithered, for the same reason."""
    some = pictures[:: -(-len(pictures) // _LOOKED_AT)]
    width, height = (max(1, side // 2) for side in some[0].size)
    all_of_them = Image.new("RGB", (width, height * len(some)))
    for number, picture in enumerate(some):
        all_of_them.paste(picture.resize((width, height), Image.Resampling.NEAREST), (0, number * height))
    return all_of_them.quantize(256, Image.Quantize.MEDIANCUT)


def gif_frames(content: bytes) -> Iterator[Image.Image]:
    """The pictures of a GIF, RGB."""
    with Image.open(io.BytesIO(content)) as animation:
        for number in range(getattr(animation, "n_frames", 1)):
            animation.seek(number)
            yield animation.convert("RGB")
