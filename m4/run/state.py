"""Where a run is, saved with every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass
class LoopState:
    """Where the run is."""

    step: int = 0  # finished optimiser steps
    position: int = 0  # samples consumed, in the order of training
    seconds: float = 0.0  # wall clock of the training loop, evaluations included, over all resumptions
    skipped_steps: int = 0  # whose loss or gradient was not finite
    evaluated_step: int = -1
    first_evaluation: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def evaluation_loss(self) -> float | None:
        """Of the weights as they are; None where they were not evaluated."""
        current = self.evaluation is not None and self.evaluated_step == self.step
        return self.evaluation["loss"] if current and self.evaluation is not None else None

    def restore(self, saved: dict[str, Any]) -> None:
        """Be where a checkpoint was."""
        vars(self).update(asdict(LoopState(**saved)))


def random_state() -> dict[str, torch.Tensor]:
    """States of PyTorch's generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """What `random_state` returned, as far as this machine has the generators."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
