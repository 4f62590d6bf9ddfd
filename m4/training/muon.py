"""Muon for the matrices of the trunk: torch's, in the precision that the processor multiplies fast.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): the momentum of a matrix is
orthogonalised by five steps of a Newton-Schulz iteration before it updates the weights. torch's iterates in bfloat16.
PyTorch multiplies bfloat16 number by number on a processor with AVX2 alone, at about 1 GFLOP/s, so that an update took
longer than the forward and backward passes of a small model. Where the processor has no instructions for such products
the same iteration runs in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from m4.errors import ConfigError
from m4kernels.processor import slow_bf16

MOMENTUM = 0.95
# torch has Muon since 2.9; `muon` refuses an older one.
_Muon: Any = getattr(torch.optim, "Muon", torch.optim.Optimizer)


def muon(matrices: list[nn.Parameter], *, lr: float, weight_decay: float) -> Muon:
    """Muon of two-dimensional parameters, with updates of AdamW's root mean square (0.2 · sqrt of the larger side;
    Liu et al., "Muon is Scalable for LLM Training", 2025).

    Raises:
        ConfigError: this torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer: muon needs torch 2.9 or newer, which brings it, this is {torch.__version__}; "
            "use optimizer=adamw, or pip install --upgrade torch"
        )
    return Muon(
        [{"params": matrices, "lr_on_host": True}],
        lr=lr,
        weight_decay=weight_decay,
        momentum=MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )


class Muon(_Muon):
    """torch.optim.Muon as `muon` makes it; see there and the module."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters."""
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        if not on_cpu or slow_bf16() is None:
            return super().step(closure)
        if closure is not None:
            raise ValueError("Muon.step takes no closure on this processor")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return None

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, lr = self.state[p], float(group["lr"])
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"])  # Nesterov's
        update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonalised(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """x (m, n) with singular values near 1, in the dtype of x: ``steps`` times a x + (b + c x xᵀ) x xᵀ x of x over its
    Frobenius norm, which is at least ``eps``."""
    a, b, c = coefficients
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if x.shape[0] > x.shape[1] else wide
