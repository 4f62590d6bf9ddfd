"""A float32 linear layer on oneDNN's product, through the operator that torch.compile's CPU backend uses."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.device import Unavailable


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (N, K).T. It has no `out=`, so its result is fresh memory."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        return product(grad, weight.T), product(grad.T, x.T)


def linear_onednn(x: Tensor, weight: Tensor) -> Tensor:
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this PyTorch has no oneDNN")
    return _Linear.apply(x, weight)
