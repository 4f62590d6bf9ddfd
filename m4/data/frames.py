"""Frames of a video on disk: which files they are, in which order, and their pixels as 8-bit RGB.

What a video's own files can do to a reader becomes a DataError here and in `m4.data.penn_action`, so that one video is
reported and the others go on; whatever else is raised is a bug, or the machine's fault (see `reading`).
"""

from __future__ import annotations

import errno
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from m4.errors import DataError, data_error

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
BAD_FILE = "Fetch this file again, or leave the video out."

# Told by content, whatever the ending says; JPEG includes MPO. Pillow's other readers are left out: some run programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
# What Pillow raises on damaged files (found by cutting and flipping bytes of JPEG, PNG, GIF, TIFF and WebP files).
_DECODE_ERRORS = (
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# Errors of the machine, not of one file: they end the run, since every other video would meet them too.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN}

_ORIENTATION = 0x0112  # the EXIF tag
_PLAIN = {"1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV"}
_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_GRAY_16 = {"I;16", "I;16B", "I;16L", "I;16N"}
_REFUSED = {
    "CMYK": "inks, whose colours depend on the press",
    "LAB": "CIE L*a*b*, for which no conversion is fixed here",
    "I": "32-bit integers of unknown range",
    "F": "floats of unknown range",
}


@contextmanager
def reading(path: str | os.PathLike, expected: str, remedy: str = BAD_FILE) -> Iterator[None]:
    """The one rule for which OSErrors are a video's fault: inside, they become a DataError naming ``path``.

    A file that is missing, unreadable, a folder, a link to nothing or on a bad sector is the video's fault. A full
    disk, no more file descriptors and no more memory are not: those pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        raise data_error(path, expected=expected, actual=error.strerror or f"{error}", remedy=remedy) from error


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts names as people count: 2 before 10; equal numbers (1, 01) by the characters."""
    parts = re.split(r"(\d+)", name)
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def frame_names(folder: Path) -> list[str]:
    """Names of the frames in a folder, in no order; hidden files and other endings are no frames.

    Raises DataError for a folder that cannot be read, or a frame that is no file (a link to nothing, a folder).
    """
    names = []
    with reading(folder, "a folder of frames that can be read"), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or Path(entry.name).suffix.lower() not in FRAME_SUFFIXES:
                continue
            with reading(entry.path, "a whole image file"):
                plain = entry.is_file()
            if not plain:
                kind = "a folder" if entry.is_dir() else "a link to nothing" if entry.is_symlink() else "no plain file"
                raise data_error(entry.path, expected="a whole image file", actual=kind, remedy=BAD_FILE)
            names.append(entry.name)
    return names


def order_frames(folder: Path, names: Sequence[str]) -> list[str]:
    """``names`` in the order of the frame number, the run of digits in them that counts on without a gap.

    The number may stand anywhere and begin anywhere, with or without leading zeros; other numbers in the names, whether
    constant or not, do not matter. Raises DataError naming two files where no run of digits counts on (no number, a
    gap, a number that occurs twice), where two of them do and disagree, or where a minus may belong to the number.
    """
    names = sorted(names, key=natural_key)
    if len(names) < 2:
        return names
    columns = _number_columns(names)
    orders: list[list[str]] = []
    for column in columns:
        numbers = {name: number for name, (number, _) in zip(names, column, strict=True)}
        order = sorted(names, key=lambda name: numbers[name])
        if all(numbers[after] == numbers[before] + 1 for before, after in pairwise(order)):
            _refuse_sign(folder, names, column)
            if order not in orders:
                orders.append(order)
    if len(orders) == 1:
        return orders[0]
    if orders:
        first, second = next((a, b) for a, b in zip(*orders[:2], strict=True) if a != b)
        found = f"two numbers that count: by one {first} comes first, by the other {second}"
    elif columns:
        # The number with the fewest repeats, of several the last, is the likeliest to be meant.
        column = max(reversed(columns), key=lambda column: len({number for number, _ in column}))
        ranked = sorted((number, natural_key(name)) for name, (number, _) in zip(names, column, strict=True))
        (_, (_, before)), (_, (_, after)) = next((a, b) for a, b in pairwise(ranked) if b[0] != a[0] + 1)
        found = f"{after} after {before}"
    else:
        found = f"{names[0]} and {names[1]}, which no number orders"
    raise data_error(
        folder,
        expected="frames with consecutive numbers",
        actual=found,
        remedy="Unpack the frames again, or rename them 000001, 000002, …: joints are matched to frames by number.",
    )


def _number_columns(names: Sequence[str]) -> list[list[tuple[int, str]]]:
    """What may be the frame number: per run of digits that all names share, (number, text before it) of each name.

    The k-th run from the front is shared if all names have the same text up to it, from the back if they have the same
    text after it; so a hash or a time stamp behind or before the number does no harm.
    """
    # Text, digits, text, …, text. Capitals do not tell names apart: IMG_1.JPG, img_2.jpg.
    parts = [re.split(r"(\d+)", Path(name).stem.casefold()) for name in names]
    fewest = min(len(split) // 2 for split in parts)
    found: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for fixed, place, before in ((slice(None, None, 2), 1, 0), (slice(None, None, -2), -2, -3)):
        step = 1 if place > 0 else -1
        for run in range(fewest):
            if len({tuple(split[fixed][: run + 1]) for split in parts}) > 1:
                break
            offset = 2 * step * run
            column = [(int(split[place + offset]), _text_before(split, before + offset)) for split in parts]
            found.setdefault(tuple(number for number, _ in column), column)
    return list(found.values())


def _text_before(split: list[str], index: int) -> str:
    """The text at ``index``, behind a digit where one stands before it."""
    return split[index] if index % len(split) == 0 else f"0{split[index]}"


def _refuse_sign(folder: Path, names: Sequence[str], column: Sequence[tuple[int, str]]) -> None:
    """-2, -1, 0 or 3, 2, 1 behind dashes: a dash that stands alone before the number may be a minus."""
    signed = [bool(re.search(r"(^|[^\w)\]]|_)[-\u2212]$", before)) for _, before in column]
    if any(signed):
        raise data_error(
            folder,
            expected="frames with numbers whose sign is plain",
            actual=f"{names[signed.index(True)]} beside {names[-1 if signed.index(True) == 0 else 0]}",
            remedy="Rename them 000001, 000002, …: joints are matched to frames by number.",
        )


def read_frame(path: str | os.PathLike) -> Image.Image:
    """Decode one frame completely, as 8-bit RGB. Raises DataError for anything but one whole, upright, opaque picture.

    Bilevel, grey, palette, YCbCr and HSV pictures are converted exactly or by the formulas of JFIF. 16-bit grey is
    scaled to 8 bits (65535 → 255), of 16-bit RGB the upper byte is taken. An alpha channel or a transparent colour is
    dropped if no pixel is transparent, and refused otherwise: no background is known. CMYK, CIE Lab, 32-bit integers
    and floats are refused, as they have no fixed meaning in 8-bit RGB; so are animations, pictures to be turned by
    their EXIF orientation (the joints may belong to either way up) and pictures beyond Pillow's MAX_IMAGE_PIXELS. An
    embedded ICC profile is ignored, as video decoders and image sets do. The format is told by content.
    """
    expected = "a whole image file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with reading(path, expected), Image.open(path, formats=_FORMATS) as image:
                refusal = _refusal(image)
                if refusal is None:
                    image.load()
                    return to_rgb(image)
    except UnreadablePixels as error:
        refusal = error.args
    except DataError:
        raise
    except _DECODE_ERRORS as error:
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        reason = f"{size} bytes ({type(error).__name__}: {error})"
        raise data_error(path, expected=expected, actual=reason, remedy=BAD_FILE) from error
    expected, actual, remedy = refusal
    raise data_error(path, expected=expected, actual=actual, remedy=remedy)


def _refusal(image: Image.Image) -> tuple[str, str, str] | None:
    """What is expected, found and to be done, for a picture that is none although it can be decoded."""
    # A camera's MPO file holds the picture first, and then previews or other views of it.
    count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if count > 1:
        return "one picture", f"{image.format} of {count} pictures", "Write every frame to a file of its own."
    turned = image.getexif().get(_ORIENTATION)
    if turned in range(2, 9):
        return (
            "an upright picture (EXIF orientation 1)",
            f"orientation {turned}",
            "Turn the pixels if the joints belong to the turned picture (mogrify -auto-orient), else remove the tag "
            "(exiftool -Orientation=).",
        )
    return None


class UnreadablePixels(Exception):
    """Pixels that do not tell their 8-bit RGB values: what was expected, what was found, the remedy."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture of any Pillow mode as RGB, by the rules of `read_frame`. Raises UnreadablePixels."""
    mode = image.mode
    if mode in _GRAY_16 or (mode == "I" and image.format == "PNG"):  # as older versions of Pillow open 16-bit grey
        values = np.asarray(image.convert("I"))
        if "transparency" in image.info and (values == image.info["transparency"]).any():
            raise _transparent()
        # 65535 = 257 · 255, so this rounds to the nearest of the 8-bit values.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode not in _PLAIN | _WITH_ALPHA:
        raise UnreadablePixels(
            "pixels of 8 bits or 16-bit grey",
            f"mode {mode}: {_REFUSED.get(mode, 'unknown here')}",
            "Convert the frames to 8-bit RGB.",
        )
    if mode == "La":
        image = image.convert("LA")
    if mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise _transparent()
    return image.convert("RGB")


def _transparent() -> UnreadablePixels:
    return UnreadablePixels(
        "opaque pixels",
        "transparent ones, with nothing known to be behind them",
        "Flatten the frames onto the background they should have (mogrify -background black -alpha remove).",
    )
