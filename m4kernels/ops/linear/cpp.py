"""linear on the CPU, through csrc/linear: products of our own, with GELU, bias and residual done as operands are packed
and results written."""

import torch
from torch import Tensor

from m4kernels import _ext
from m4kernels._workspace import workspace
from m4kernels.ops.linear import copies
from m4kernels.ops.linear.arguments import CPU_DTYPES, LinearArguments, Wanted
from m4kernels.processor import dots_bf16

MatrixTuple = tuple[int, bool, int, int]  # address (0: none), whether bfloat16, strides
NONE: MatrixTuple = (0, False, 0, 0)


def can_run(call: LinearArguments) -> str | None:
    """float32 and bfloat16, also mixed under autocast."""
    other = call.foreign_dtype()
    return None if other is None else f"it computes in float32 and bfloat16, got {other}"


def linear(call: LinearArguments) -> Tensor:
    """(T, N)"""
    y = torch.empty(call.x.shape[0], call.weight.shape[0], dtype=call.result_dtype)
    bias = None if call.bias is None else call.bias.to(torch.float32).contiguous()
    _product(call, call.x, _weight(call).T, y, a_gelu=call.gelu, bias=bias, residual=call.residual)
    return y


def linear_backward(call: LinearArguments, grad: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, weight and bias."""
    if grad.dtype not in CPU_DTYPES:
        grad = grad.to(torch.float32)
    dx, dweight, dbias = (torch.empty(0, dtype=call.x.dtype) for _ in range(3))
    if wanted.x:
        dx = torch.empty(call.x.shape, dtype=call.x.dtype)
        _product(call, grad, _weight(call), dx, slope_at=call.x if call.gelu else None)
    if wanted.weight:
        dweight = torch.empty(call.weight.shape, dtype=call.weight.dtype)
        _product(call, grad.T, call.x, dweight, b_gelu=call.gelu)
    if wanted.bias and call.bias is not None:
        dbias = grad.sum(0, dtype=torch.float32).to(call.bias.dtype)
    return dx, dweight, dbias


def _weight(call: LinearArguments) -> Tensor:
    """(N, K) as the products read it: within a training step a copy that is rounded already."""
    return copies.rounded(call.weight) if call.operand_dtype == torch.bfloat16 else call.weight


def _product(
    call: LinearArguments,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    a_gelu: bool = False,
    b_gelu: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    slope_at: Tensor | None = None,
) -> None:
    """out = (a @ b + bias + residual) * gelu'(slope_at)"""
    extension, threads = _ext.require(), torch.get_num_threads()
    rounded = call.operand_dtype == torch.bfloat16
    (rows, depth), columns = a.shape, b.shape[1]
    shape = {"rows": rows, "columns": columns, "depth": depth, "threads": threads}
    shape["bf16_products"] = rounded and dots_bf16()
    with workspace(extension.linear_workspace(**shape)) as memory:
        extension.linear(
            a=_matrix(a),
            b=_matrix(b),
            a_gelu=a_gelu,
            b_gelu=b_gelu,
            round=rounded,
            bias=0 if bias is None else bias.data_ptr(),
            residual=NONE if residual is None else _matrix(residual),
            slope_at=NONE if slope_at is None else _matrix(slope_at),
            out=out.data_ptr(),
            out_is_bf16=out.dtype == torch.bfloat16,
            workspace=memory.data_ptr(),
            **shape,
        )


def _matrix(x: Tensor) -> MatrixTuple:
    return x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0), x.stride(1)
