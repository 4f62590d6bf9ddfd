"""layer_norm in plain PyTorch: the specification of every other backend."""

import torch
from torch import Tensor

from m4kernels.backend import runs_always
from m4kernels.ops.layer_norm.arguments import Gradients, NormArguments, Wanted

can_run = runs_always


def layer_norm(call: NormArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`F.layer_norm(x + update, weight.shape, weight, None, eps)` computed in `call.sum_dtype`, and x + update."""
    dtype = call.sum_dtype
    total = call.x if call.update is None else call.x + call.update
    normed, mean, rstd = torch.native_layer_norm(
        total.to(dtype), call.weight.shape, call.weight.to(dtype), None, call.eps
    )
    added = total.new_empty(0) if call.update is None else total.contiguous()
    return normed.to(call.normed_dtype), added, mean.view(-1), rstd.view(-1)


def layer_norm_backward(call: NormArguments, grads: Gradients, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's derivative, plus the gradient that comes from elsewhere."""
    dtype, column = call.sum_dtype, (-1, 1)
    mask = [wanted.x is not None or wanted.update is not None, wanted.weight, False]
    dtotal, dweight, _ = torch.ops.aten.native_layer_norm_backward(
        grads.normed.to(dtype).contiguous(),
        call.x.to(dtype).contiguous(),
        call.weight.shape,
        grads.mean.view(column),
        grads.rstd.view(column),
        call.weight.to(dtype),
        None,
        mask,
    )
    if mask[0] and grads.total is not None:
        dtotal = dtotal + grads.total.to(dtype)
    return (
        call.x.new_empty(0) if wanted.x is None else dtotal.to(wanted.x),
        call.x.new_empty(0) if wanted.update is None else dtotal.to(wanted.update, copy=True),
        dweight.to(call.weight.dtype) if wanted.weight else call.weight.new_empty(0),
    )
