"""One line that says what to install, where the kernels are without what the trainer needs beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ModuleNotFoundError):
    """A package of an extra of pyproject.toml is not installed."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import packages of this extra within the block; a command (``python -m m4.train``) ends with one line.

    Raises:
        MissingExtra: one is not installed; names it and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        said = f"{error.name} is not installed, which m4 needs: pip install 'm4kernels[{name}]'"
        command = getattr(sys.modules.get("__main__"), "__spec__", None)
        if command is not None and command.name.partition(".")[0] == "m4":
            print(f"error: {said}", file=sys.stderr)
            raise SystemExit(2) from None
        raise MissingExtra(said, name=error.name) from None
