"""The arguments of one call of linear, checked; what every backend receives."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m4kernels._dtypes import compute_dtype
from m4kernels.backend import Backend

OP = "linear"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU_DTYPES = (torch.float32, torch.bfloat16)  # of the backend cpp


class LinearArguments(NamedTuple):
    """One call of the op; shapes as in `api.linear`.

    Args:
        autocast_dtype: the dtype that GELU(x) and weight are rounded to before they are multiplied; None for their own.
    """

    x: Tensor  # (T, K)
    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)
    residual: Tensor | None  # (T, N)
    gelu: bool
    autocast_dtype: torch.dtype | None

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def operand_dtype(self) -> torch.dtype:
        """What the matrix products multiply."""
        return self.x.dtype if self.autocast_dtype is None else self.autocast_dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """What they add up in: float64 for float64 operands, else float32."""
        return compute_dtype(self.operand_dtype)

    @property
    def result_dtype(self) -> torch.dtype:
        """That of the operands; of the residual where that is wider."""
        if self.residual is None:
            return self.operand_dtype
        return torch.promote_types(self.operand_dtype, self.residual.dtype)

    def foreign_dtype(self) -> torch.dtype | None:
        """A dtype that the backend cpp does not take; None where it takes all of the call."""
        dtypes = [self.operand_dtype]
        for tensor in (self.x, self.weight, self.bias, self.residual):
            if tensor is not None:
                dtypes.append(tensor.dtype)
        for dtype in dtypes:
            if dtype not in CPU_DTYPES:
                return dtype
        return None

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes or devices do not fit; reads no values."""
        x, weight = self.x, self.weight
        for name, matrix, shape in (("x", x, "(T, K)"), ("weight", weight, "(N, K)")):
            if matrix.dim() != 2:
                raise ValueError(f"{OP}: {name} must have shape {shape}, got {tuple(matrix.shape)}")
        if x.shape[1] != weight.shape[1]:
            raise ValueError(f"{OP}: x has K = {x.shape[1]}, weight has K = {weight.shape[1]}; expected the same")
        for name, other, wanted in (
            ("bias", self.bias, weight.shape[:1]),
            ("residual", self.residual, (x.shape[0], weight.shape[0])),
        ):
            if other is not None and other.shape != wanted:
                raise ValueError(f"{OP}: {name} must have shape {tuple(wanted)}, got {tuple(other.shape)}")
        for name, tensor in (("x", x), ("weight", weight), ("bias", self.bias), ("residual", self.residual)):
            if tensor is None:
                continue
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{OP}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
            if tensor.device != x.device:
                raise ValueError(f"{OP}: {name} is on {tensor.device}, x on {x.device}; expected one device")
        if self.autocast_dtype is None and x.dtype != weight.dtype:
            raise ValueError(f"{OP}: x is {x.dtype}, weight {weight.dtype}; expected the same dtype")
        if self.operand_dtype not in DTYPES:
            raise ValueError(f"{OP}: the autocast dtype must be float32, bfloat16 or float16, got {self.operand_dtype}")

    def check_gradient(self, grad: Tensor) -> None:
        """Raise ValueError where the gradient of the result does not fit; reads no values."""
        shape = (self.x.shape[0], self.weight.shape[0])
        if grad.shape != shape or grad.device != self.x.device or not grad.is_floating_point():
            raise ValueError(
                f"{OP}: grad must be floating {shape} on {self.x.device}, "
                f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
            )


class Wanted(NamedTuple):
    """Which gradients a backward pass is to give."""

    x: bool
    weight: bool
    bias: bool


class LinearBackend(Backend, Protocol):
    """What a backend of this op has."""

    def linear(self, call: LinearArguments) -> Tensor:
        """(T, N) in `call.result_dtype`, contiguous"""

    def linear_backward(self, call: LinearArguments, grad: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients with respect to x, weight and bias, from grad (T, N), each in the dtype of its tensor; one that
        is not wanted has shape (0,). `call.residual` is None"""
