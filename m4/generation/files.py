"""Files of what was generated, by their endings."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m4.files import write_atomically
from m4.generation.results import Result
from m4.pictures.gif import gif_bytes
from m4.pictures.sheets import picture_bytes, picture_endings

ANIMATED, ARRAYS, FIGURES = ".gif", ".npz", ".json"


def endings() -> tuple[str, ...]:
    """Endings of the files that can be written."""
    return (*dict.fromkeys([*picture_endings(), ANIMATED]), ARRAYS, FIGURES)


def is_drawn(path: Path) -> bool:
    """Whether the file is a picture or an animation."""
    return path.suffix.lower() not in (ARRAYS, FIGURES)


def write_result(path: Path, result: Result, about: Mapping[str, Any], seconds: float) -> None:
    """Write one file, whole or not at all.

    Args:
        about: what was asked for; in .npz as JSON text under ``about``, in .json beside the figures.
        seconds: that an animation shows each moment.
    """
    write_atomically(path, _content(path.suffix.lower(), result, about, seconds))


def _content(ending: str, result: Result, about: Mapping[str, Any], seconds: float) -> bytes:
    if ending == ANIMATED:
        return gif_bytes(result.frames(), seconds)
    if ending == FIGURES:
        return (json.dumps({**about, **result.figures()}, indent=1, ensure_ascii=False) + "\n").encode()
    if ending == ARRAYS:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"samples": np.array(about["samples"]), "about": np.array(json.dumps(dict(about)))}
        np.savez_compressed(buffer, **(arrays | result.arrays()))
        return buffer.getvalue()
    return picture_bytes(result.picture(), ending)
