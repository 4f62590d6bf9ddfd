"""Files that are whole or absent: everything is written under a temporary name and renamed."""

from __future__ import annotations

import os
from pathlib import Path

from m4.errors import data_error


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader, or a run killed half-way, never sees a part of it.

    Raises OSError naming ``path``, for instance for a full disk.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A full disk does not say for which file.
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def writable_file(path: str | os.PathLike) -> Path:
    """Make sure that `write_atomically` will be able to write ``path``; its folder is made if need be.

    Raises OSError naming ``path``.
    """
    path = Path(path)
    probe = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    return path


def writable_folder(path: str | os.PathLike) -> Path:
    """Create ``path`` if need be and make sure that files can be made in it. Raises DataError with the reason."""
    path = Path(path)
    probe = path / f".{os.getpid()}.probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise data_error(
            path,
            expected="a folder that can be written to",
            actual=f"{error.strerror or error}",
            remedy="Choose another folder, or change its permissions.",
        ) from error
    return path


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
