"""The processes of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass

from m4.errors import ConfigError


@dataclass(frozen=True)
class World:
    """The processes of this run; the one place that knows about ranks."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun announced; more than one process is refused until gradients are exchanged between them."""
        size = count_from_environment("WORLD_SIZE", 1)
        if size != 1:
            raise ConfigError(f"WORLD_SIZE: training runs in one process, got {size}; start torchrun with one process")
        return cls()


def count_from_environment(name: str, default: int) -> int:
    """A variable of the environment that holds a count or a rank.

    Raises:
        ConfigError: it is set to anything but digits.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"{name}: expected a number, got {text!r}; unset it, or start the command with torchrun")
    return int(text)
