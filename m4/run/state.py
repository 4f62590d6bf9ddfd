"""Where a run is, saved with every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class LoopState:
    """Where the run is; saved with every checkpoint."""

    step: int = 0  # finished optimiser steps
    position: int = 0  # samples consumed from the stream
    seconds: float = 0.0  # wall clock of the training steps, over all resumptions
    evaluated_step: int = -1
    first_evaluation: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
