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
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size != 1:
            raise ConfigError(f"WORLD_SIZE: training runs in one process, got {size}; start torchrun with one process")
        return cls()
