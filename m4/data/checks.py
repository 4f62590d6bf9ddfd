"""Arguments that several of the data commands share, checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from m4.errors import data_error

MAX_SEED = 2**63 - 1
MAX_WORKERS = max(64, 4 * (os.cpu_count() or 1))  # more would bring the machine down as they start
MAX_NAME = 200  # bytes of a video's name: with endings, that of a temporary file must stay below 255


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises DataError unless ``value`` is a whole number in [least, most]."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        span = f"at least {least}" + ("" if most is None else f" and at most {most}")
        kind = "" if whole else ", a whole number"
        raise data_error(name, expected=f"{span}{kind}", actual=repr(value), remedy="Correct it.")


def check_seed(seed: object) -> None:
    """Raises DataError unless ``seed`` is a whole number that is not negative, of 63 bits at most."""
    check_whole("seed", seed, 0, MAX_SEED)


def check_workers(workers: object) -> None:
    """Raises DataError unless ``workers`` is a whole number, 1 to MAX_WORKERS."""
    check_whole("workers", workers, 1, MAX_WORKERS)


def check_apart(out: Path, source: Path) -> None:
    """Raises DataError where the output is the input or lies inside it, and would be taken for a part of it."""
    inner, outer = out.expanduser().resolve(), source.expanduser().resolve()
    if inner == outer or outer in inner.parents:
        raise data_error(
            out,
            expected=f"an output folder outside of the input, {source}",
            actual="the input itself" if inner == outer else "one inside",
            remedy="Choose another --out.",
        )


def printable(name: str) -> str:
    """A file name on one line of any terminal: what cannot be printed as it is, is escaped."""
    return name if name.isprintable() else ascii(name)[1:-1]


def check_name(name: str) -> None:
    """Raises DataError for a video that cannot be listed in pairs.csv, or whose files could not be named."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise data_error(
            printable(name), expected="a video with a name in UTF-8", actual="other bytes", remedy="Rename it."
        ) from None
    if length > MAX_NAME:
        raise data_error(
            printable(name), expected=f"a name of at most {MAX_NAME} bytes", actual=length, remedy="Rename the video."
        )
