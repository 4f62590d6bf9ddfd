"""Errors that a user can mend: the message says what was expected, what was found and what to do."""

from __future__ import annotations

import os


class DataError(ValueError):
    """Input data that cannot be used: names the file or argument, what was expected, what was found, what to do."""


def data_error(subject: str | os.PathLike, *, expected: object, actual: object, remedy: str) -> DataError:
    """A DataError in the house form ``subject: expected …, found …. remedy``."""
    return DataError(f"{subject}: expected {expected}, found {actual}. {remedy}")


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the key, its value and what is expected."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or resumed: the message says which, why, and what to do."""


class RankError(ValueError):
    """The ranks of a run cannot go on together: the message says which one, and what became of it."""
