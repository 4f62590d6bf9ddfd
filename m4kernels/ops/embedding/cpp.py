"""The gradient of embedding on the CPU, through csrc/embedding."""

import torch
from torch import Tensor

from m4kernels import _ext, _memory
from m4kernels.ops.embedding.arguments import OP, EmbeddingArguments


def can_run(call: EmbeddingArguments) -> str | None:
    """None when it can run this call; else the reason why not."""
    if call.values.dtype in (torch.float32, torch.float64):
        return None
    return f"it adds float32 and float64 gradients, got {call.values.dtype}"


def embedding_backward(call: EmbeddingArguments) -> Tensor:
    """(V, D) the sums of its tokens' gradients for every row, in the order of the tokens; 0 where it has none."""
    grad, ids = call.values.contiguous(), call.ids.to(torch.int64).contiguous()
    dim = grad.shape[1]
    out = _memory.empty((call.rows, dim), grad.dtype)
    extension = _ext.require()
    kernel = extension.embedding_backward_f64 if grad.dtype == torch.float64 else extension.embedding_backward_f32
    within = kernel(
        grad=grad.data_ptr(),
        ids=ids.data_ptr(),
        out=out.data_ptr(),
        tokens=ids.shape[0],
        dim=dim,
        rows=call.rows,
        threads=torch.get_num_threads(),
    )
    if not within:
        raise ValueError(f"{OP}: ids must be at least 0 and below {call.rows}, got {ids.min()} to {ids.max()}")
    return out
