"""AdamW: torch's, whose step on a CPU is one pass of `m4kernels.adamw_step` that clips as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from m4.config import TrainConfig
from m4.distributed.shards import local_part, rows_below
from m4kernels import adamw_step

BETAS = (0.9, 0.95)
EPS = 1e-8

_Tensors: TypeAlias = tuple[list[Tensor], ...]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with the same state, groups and formula, which also clips.

    On a CPU all parameters are updated in one pass of `m4kernels.adamw_step`, whose bits do not depend on the number of
    threads. On a GPU and for ``kernels: reference`` it is torch's pass, which takes the factor as a divisor; gradients
    of parameters that are divided over ranks are scaled first.

    AdamW updates every element by itself. So a group may have a rate of its own, "bins_lr", for the first rows of its
    matrices, as many as "bins" says: they are updated as a parameter apart, in views, and the state has one entry.

    Args:
        groups: of parameters, with their settings.
        config: the run.
    """

    def __init__(self, groups: list[dict[str, Any]], config: TrainConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=True)
        self.grad_factor: Tensor | None = None  # () float32, of all gradients in `step`; None for 1
        self.found_inf: Tensor | None = None  # () float32, 1 where the step must not update
        self.in_one_pass = config.kernels == "auto"  # where it can
        self._divisor: Tensor | None = None  # () float32, of the gradients in torch's pass; None for 1
        # Rows of a rate of their own, of what this rank has.
        self._bins = {p: rows_below(group["bins"], p) for group in groups if "bins" in group for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, or none."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        parameters = [p for _, some in groups for p in some]
        in_one_pass = self.in_one_pass and all(type(p) is torch.nn.Parameter and p.is_cpu for p in parameters)
        # torch's fused kernel divides gradients as it reads them.
        self._divisor = None
        if not in_one_pass and self.grad_factor is not None:
            if all(type(p.grad) is Tensor for p in parameters):
                self._divisor = self.grad_factor.reciprocal()
            else:
                scale_gradients(parameters, self.grad_factor)
        for group, some in groups:
            for rate, tensors in self._parts(group, some):
                (self._step_in_one_pass if in_one_pass else self._step_of_torch)(group, rate, tensors)

    def _step_in_one_pass(self, group: dict[str, Any], rate: Tensor | float, tensors: _Tensors) -> None:
        adamw_step(
            *tensors,
            lr=rate,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_factor=self.grad_factor,
            found_inf=self.found_inf,
            backend="auto",  # M4KERNELS_BACKEND may name one of a GPU, for the model
        )

    def _step_of_torch(self, group: dict[str, Any], rate: Tensor | float, tensors: _Tensors) -> None:
        parameters, gradients, means, squares, steps = tensors
        adamw(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            capturable=group["capturable"],
            grad_scale=self._divisor,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=rate,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _parts(self, group: dict[str, Any], some: list[Tensor]) -> Iterator[tuple[Tensor | float, _Tensors]]:
        """The rates of a group, each with what has it: parameters, gradients, their two moments, steps taken before."""
        if not some:
            return
        states = [self._state_of(p) for p in some]
        gradients = [p.grad for p in some if p.grad is not None]
        tensors = (some, gradients, *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")))
        steps = [state["step"] for state in states]
        if "bins" not in group:
            yield group["lr"], (*tensors, steps)
            return
        # Views of what this rank holds; a step counts once, so the bins count a copy of it.
        rows = [self._bins[p] for p in some]
        here = [[local_part(tensor) for tensor in of_kind] for of_kind in tensors]
        of_bins = ([tensor[:n] for tensor, n in zip(of_kind, rows, strict=True)] for of_kind in here)
        yield group["bins_lr"], (*of_bins, [step.clone() for step in steps])
        others = ([tensor[n:] for tensor, n in zip(of_kind, rows, strict=True)] for of_kind in here)
        yield group["lr"], (*others, steps)

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
