"""The one error type of the data pipeline."""

from __future__ import annotations

import os


class DataError(ValueError):
    """Input data that cannot be used: names the file or argument, what was expected, what was found, what to do."""


def data_error(where: str | os.PathLike, *, expected: object, actual: object, remedy: str) -> DataError:
    """A DataError in the house form ``where: expected …, found …. remedy``."""
    return DataError(f"{where}: expected {expected}, found {actual}. {remedy}")
