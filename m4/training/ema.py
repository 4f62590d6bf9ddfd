"""An exponential moving average of the weights, beside the ones that are trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from m4.model import M4


class AveragedWeights:
    """After every update average ← decay · average + (1 − decay) · weights, from the initial weights on, in float32.

    Args:
        model: the model that is trained; its weights stay where they are in memory.
        decay: in (0, 1); the average looks back over about 1 / (1 − decay) steps.
    """

    def __init__(self, model: M4, decay: float) -> None:
        self._trained: nn.Module = model
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._share = torch.tensor(1.0 - decay, device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """After an update of the weights.

        Args:
            found_inf: () float, 1 where there was none, and so there is none here. It is not read on the host.
        """
        share = self._share * (1.0 - found_inf)
        # A launch a parameter, which in a captured step costs nothing; with a share that is on the device torch's
        # foreach operations take three passes, which move 2.7 times the bytes.
        for average, weight in zip(self.model.parameters(), self._trained.parameters(), strict=True):
            average.lerp_(weight, share)

    def start_over(self) -> None:
        """Begin with the weights as they are."""
        self.model.load_state_dict(self._trained.state_dict())


def averaged_model(averaged: AveragedWeights | None) -> M4 | None:
    """The model with averaged weights, if there are some."""
    return None if averaged is None else averaged.model
