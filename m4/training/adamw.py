"""AdamW: torch's, whose step on a CPU is one pass of `m4kernels.adamw_step` that clips as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m4.config import TrainConfig
from m4kernels import adamw_step

BETAS = (0.9, 0.95)
EPS = 1e-8


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with the same state, groups and formula, which also clips.

    On a CPU all parameters are updated in one pass of `m4kernels.adamw_step`, whose bits do not depend on the number of
    threads. On a GPU, for parameters that are divided over ranks, and for ``kernels: reference``, gradients are scaled
    first and torch does the rest.

    Args:
        groups: of parameters, with their settings.
        config: the run.
    """

    def __init__(self, groups: list[dict[str, Any]], config: TrainConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=True)
        self.grad_factor: Tensor | None = None  # () float32, of all gradients in `step`; None for 1
        self.found_inf: Tensor | None = None  # () float32, 1 where the step must not update
        self.in_one_pass = config.kernels == "auto"  # where it can

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, or none."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        parameters = [p for _, some in groups for p in some]
        if not (self.in_one_pass and all(type(p) is torch.nn.Parameter and p.is_cpu for p in parameters)):
            scale_gradients(parameters, self.grad_factor)
            super().step()
            return
        for group, some in groups:
            states = [self._state_of(p) for p in some]
            adamw_step(
                some,
                [p.grad for p in some if p.grad is not None],
                *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_factor=self.grad_factor,
                found_inf=self.found_inf,
                backend="auto",  # M4KERNELS_BACKEND may name one of a GPU, for the model
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """As torch begins and keeps it."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def clip_factor(norm: Tensor, most: float | None) -> Tensor | None:
    """() what gradients of this norm are multiplied by, so that it is at most ``most``; None where nothing is clipped.

    With the formula of `torch.nn.utils.clip_grad_norm_`.
    """
    return None if most is None else (most / (norm + 1e-6)).clamp(max=1.0)


def scale_gradients(parameters: Sequence[Tensor], factor: Tensor | None) -> None:
    """Multiply the gradients, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if factor is None or not gradients:
        return
    if all(type(gradient) is Tensor for gradient in gradients):
        torch._foreach_mul_(gradients, factor)
        return
    for gradient in gradients:  # divided over ranks
        gradient.mul_(factor)
