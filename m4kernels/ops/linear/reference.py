"""A linear layer of a transformer in plain PyTorch: the specification of every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from m4kernels.backend import runs_always
from m4kernels.ops.linear.arguments import LinearArguments, Wanted

can_run = runs_always


def linear(call: LinearArguments) -> Tensor:
    """(T, N): products of operands that are rounded to `call.operand_dtype`; all else in `call.sum_dtype`, rounded once
    at the end."""
    y = _input(call) @ _rounded(call, call.weight).T
    for summand in (call.bias, call.residual):
        if summand is not None:
            y = y + summand.to(torch.promote_types(y.dtype, summand.dtype))
    return y.to(call.result_dtype)


def linear_backward(call: LinearArguments, grad: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, weight and bias; the products multiply `grad` rounded as the operands are."""
    g = _rounded(call, grad)
    dx, dweight, dbias = (call.x.new_empty(0) for _ in range(3))
    if wanted.x:
        dx = g @ _rounded(call, call.weight)
        if call.gelu:
            dx = torch.ops.aten.gelu_backward(dx, call.x.to(dx.dtype))
        dx = dx.to(call.x.dtype)
    if wanted.weight:
        dweight = (g.T @ _input(call)).to(call.weight.dtype)
    if wanted.bias and call.bias is not None:
        dbias = grad.to(call.sum_dtype).sum(0).to(call.bias.dtype)
    return dx, dweight, dbias


def _rounded(call: LinearArguments, matrix: Tensor) -> Tensor:
    return matrix.to(call.operand_dtype).to(call.sum_dtype)


def _input(call: LinearArguments) -> Tensor:
    """(T, K): what the weight is multiplied with."""
    return _rounded(call, F.gelu(call.x.to(call.sum_dtype)) if call.gelu else call.x)
