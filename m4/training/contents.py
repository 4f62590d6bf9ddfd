"""What a checkpoint holds of a run that trains: taken from its parts, and given back to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from m4.build import build_model
from m4.checkpoint import SavedCheckpoint
from m4.checkpoint_files import HasWeights, Weights
from m4.config import TrainConfig
from m4.model import M4
from m4.model.weights import load_matching
from m4.run.state import LoopState, random_state, set_random_state
from m4.training.ema import AveragedWeights, averaged_model
from m4.training.exchange import Exchange
from m4.training.optimizer import load_optimizer_state
from m4.training.step import TrainStep


@dataclass(frozen=True)
class Contents:
    """What `m4.checkpoint.save_checkpoint` is given: of one step, as one process has it."""

    step: int
    model: HasWeights
    state: dict[str, Any]
    evaluation_loss: float | None
    averaged: HasWeights | None

    def copied(self, copy: Callable[[Any], Any]) -> Contents:
        """The same, with every tensor copied."""
        averaged = None if self.averaged is None else self.averaged.state_dict()
        weights, state, averages = copy((self.model.state_dict(), self.state, averaged))
        return Contents(
            self.step, Weights(weights), state, self.evaluation_loss, None if averages is None else Weights(averages)
        )


@dataclass(frozen=True)
class Trained:
    """The parts of a run that change as it trains."""

    config: TrainConfig
    device: torch.device
    model: M4
    averaged: AveragedWeights | None
    optimizer: torch.optim.Optimizer
    step: TrainStep
    exchange: Exchange
    state: LoopState

    def contents(self) -> Contents:
        """As they are now, sharing their memory; all ranks call it, the first one uses it."""
        model, optimizer = self.exchange.whole(self.model, self.optimizer)
        state = {"optimizer": optimizer, "loop": asdict(self.state), "random": random_state()}
        state["scaling"] = self.step.scaling()
        return Contents(self.state.step, model, state, self.state.evaluation_loss, averaged_model(self.averaged))

    def take_up(self, found: SavedCheckpoint) -> None:
        """Be as a checkpoint has it, but for the random state. Raises ValueError: it is of another model."""
        path, saved = str(found.path), found.state
        load_matching(found.weights, self.model, path)
        if self.averaged is not None:  # from here on, if they were not averaged before
            load_matching(found.averaged or found.weights, self.averaged.model, path)
        load_optimizer_state(self.optimizer, saved["optimizer"])
        self.state.restore(saved["loop"])
        self.step.start_at(self.state.skipped_steps, saved.get("scaling"))

    def take_up_random(self, found: SavedCheckpoint) -> None:
        """The random state of a checkpoint, last of all."""
        set_random_state(found.state["random"])

    def start_over(self) -> None:
        """Weights, optimiser and state of a fresh run."""
        fresh = build_model(self.config, self.device, self.model.code_levels)
        load_matching(fresh.state_dict(), self.model, "initial values")
        self.optimizer.state.clear()
        self.state.restore({})
        self.step.start_at(0)
