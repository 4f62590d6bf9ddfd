"""layer_norm on a GPU, forward and backward in one pass over memory each, and a small sum for d weight."""

from typing import Any

import torch
import triton
from torch import Tensor

from m4kernels._triton import bfloat16_unfit, launch_on
from m4kernels.ops.layer_norm import triton_kernels as kernels
from m4kernels.ops.layer_norm.arguments import Gradients, NormArguments, Wanted

MAX_DIM = 8192
# A row of at most so many columns is one warp's, 24 numbers a thread of each tensor; a wider one has a warp for 512.
COLUMNS_OF_ONE_WARP, COLUMNS_OF_A_WARP = 768, 512
# Rows of a program of the forward pass, which share one read of weight.
ROWS = 4
# Warps of the backward pass at most: each adds up its rows' shares of d weight, so fewer of them leave less to add up
# at the end, more hide more of the memory's latency. It decides the order of sums, so it is the same for every GPU.
WARPS = 2048
# The sum of the shares of d weight: tiles of a program, 16 bytes a thread and load, 64 bytes of a share in one piece.
SUM = {"BLOCK_ROWS": 512, "BLOCK_COLUMNS": 16}
SUM_WARPS = 16


def can_run(call: NormArguments) -> str | None:
    """float32, bfloat16 and float16, up to 8,192 columns."""
    if call.x.shape[1] > MAX_DIM:
        return f"it takes up to {MAX_DIM:,} columns, got {call.x.shape[1]:,}"
    tensors = (call.x, call.weight) if call.update is None else (call.x, call.weight, call.update)
    dtypes = [*(tensor.dtype for tensor in tensors), call.normed_dtype]
    if torch.float64 in dtypes:
        return "it computes in float32, got torch.float64"
    return bfloat16_unfit(call.device) if torch.bfloat16 in dtypes else None


def layer_norm(call: NormArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normed rows, x + update, and mean and 1 / standard deviation of every row."""
    x, update = call.x.contiguous(), None if call.update is None else call.update.contiguous()
    tokens, dim = x.shape
    normed = torch.empty_like(x, dtype=call.normed_dtype)
    total = None if update is None else torch.empty_like(x, dtype=call.total_dtype)
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    if tokens:
        with launch_on(x):
            kernels.norm_forward_kernel[(triton.cdiv(tokens, ROWS),)](
                x=x,
                update=update,
                weight=call.weight.contiguous(),
                normed=normed,
                total=total,
                mean=mean,
                rstd=rstd,
                tokens=tokens,
                eps=call.eps,
                ROWS=ROWS,
                **launch_of(dim),
            )
    return normed, x.new_empty(0) if total is None else total, mean, rstd


def layer_norm_backward(call: NormArguments, grads: Gradients, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient with respect to x + update in the wanted dtypes, and that of weight."""
    total, weight, (tokens, dim) = call.x.contiguous(), call.weight, call.x.shape
    launch = launch_of(dim)
    rows, programs = rows_of_programs(tokens, launch["num_warps"])
    dx, dupdate = (
        None if dtype is None else torch.empty_like(total, dtype=dtype) for dtype in (wanted.x, wanted.update)
    )
    partial = total.new_empty((programs, dim), dtype=torch.float32) if wanted.weight else None
    dweight = weight.new_empty(dim if wanted.weight else 0)
    with launch_on(total):
        if tokens:
            kernels.norm_backward_kernel[(programs,)](
                grad=grads.normed.contiguous(),
                grad_total=None if grads.total is None else grads.total.contiguous(),
                total=total,
                weight=weight.contiguous(),
                mean=grads.mean,
                rstd=grads.rstd,
                dx=dx,
                dupdate=dupdate,
                partial=partial,
                tokens=tokens,
                rows=rows,
                **launch,
            )
        if partial is not None:
            kernels.norm_sum_kernel[(triton.cdiv(dim, SUM["BLOCK_COLUMNS"]),)](
                partial=partial, dweight=dweight, programs=programs, DIM=dim, **SUM, num_warps=SUM_WARPS
            )
    dx, dupdate = (total.new_empty(0) if gradient is None else gradient for gradient in (dx, dupdate))
    return dx, dupdate, dweight


def launch_of(dim: int) -> dict[str, Any]:
    """Launch options of the kernels over rows."""
    head = 1 << (dim.bit_length() - 1)
    tail = triton.next_power_of_2(dim - head) if dim > head else 0
    warps = 1 if head + tail <= COLUMNS_OF_ONE_WARP else triton.next_power_of_2(dim) // COLUMNS_OF_A_WARP
    return {"DIM": dim, "HEAD": head, "TAIL": tail, "num_warps": warps}


def rows_of_programs(tokens: int, warps: int) -> tuple[int, int]:
    """(rows of a program, programs) of the backward pass; a function of the shape alone."""
    rows = max(1, triton.cdiv(tokens, WARPS // warps))
    return rows, triton.cdiv(tokens, rows)
