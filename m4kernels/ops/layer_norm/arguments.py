"""The arguments of one call of layer_norm, checked; what every backend receives."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m4kernels._dtypes import compute_dtype
from m4kernels.backend import Backend

OP = "layer_norm"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NormArguments(NamedTuple):
    """One call of the op; shapes as in `api.add_layer_norm`. Of its derivative x is the sum x + update."""

    x: Tensor  # (T, D)
    update: Tensor | None  # (T, D)
    weight: Tensor  # (D,)
    eps: float
    out_dtype: torch.dtype | None  # of the normed rows; None for that of the sum

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def total_dtype(self) -> torch.dtype:
        """Of x + update."""
        return self.x.dtype if self.update is None else torch.promote_types(self.x.dtype, self.update.dtype)

    @property
    def normed_dtype(self) -> torch.dtype:
        return self.total_dtype if self.out_dtype is None else self.out_dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.total_dtype)

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes, devices or numbers do not fit; reads no values."""
        x, update, weight, eps, out_dtype = self
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{OP}: x must have shape (T, D), D at least 1, got {tuple(x.shape)}")
        if weight.shape != x.shape[1:]:
            raise ValueError(f"{OP}: weight must have shape ({x.shape[1]},), got {tuple(weight.shape)}")
        if update is not None and update.shape != x.shape:
            raise ValueError(f"{OP}: update must have the shape of x, {tuple(x.shape)}, got {tuple(update.shape)}")
        for name, tensor in (("x", x), ("update", update), ("weight", weight)):
            if tensor is None:
                continue
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{OP}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
            if tensor.device != x.device:
                raise ValueError(f"{OP}: {name} is on {tensor.device}, x on {x.device}; expected one device")
        if out_dtype is not None and out_dtype not in DTYPES:
            raise ValueError(f"{OP}: out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"{OP}: eps must be at least 0 and finite, got {eps}")


class Gradients(NamedTuple):
    """What a backward pass takes besides: the gradients of the results, and what the forward pass kept."""

    normed: Tensor  # (T, D)
    total: Tensor | None  # (T, D), of x + update, from what else used that
    mean: Tensor  # (T,)
    rstd: Tensor  # (T,)

    def check_structure(self, call: NormArguments) -> None:
        """Raise ValueError where shapes, dtypes or devices do not fit; reads no values."""
        x = call.x
        for name, grad in (("grad", self.normed), ("grad_total", self.total)):
            if grad is not None and (grad.shape != x.shape or grad.device != x.device or grad.dtype not in DTYPES):
                raise ValueError(
                    f"{OP}: {name} must be floating {tuple(x.shape)} on {x.device}, "
                    f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
                )
        for name, kept in (("mean", self.mean), ("rstd", self.rstd)):
            if kept.shape != x.shape[:1] or kept.device != x.device or kept.dtype != call.sum_dtype:
                raise ValueError(
                    f"{OP}: {name} must be {call.sum_dtype} ({x.shape[0]},) on {x.device}, "
                    f"got {kept.dtype} {tuple(kept.shape)} on {kept.device}"
                )


class Wanted(NamedTuple):
    """Which gradients a backward pass is to give."""

    x: torch.dtype | None  # in which dtype; None for none
    update: torch.dtype | None
    weight: bool


class NormBackend(Backend, Protocol):
    """What a backend of this op has."""

    def layer_norm(self, call: NormArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normed rows (T, D) in `call.normed_dtype`; x + update (T, D) in `call.total_dtype`, of shape (0,) without
        an update; mean and 1 / standard deviation of every row (T,) in `call.sum_dtype`. All contiguous"""

    def layer_norm_backward(
        self, call: NormArguments, grads: Gradients, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient with respect to x + update once in each dtype that is wanted, and that of weight in its dtype;
        one that is not wanted has shape (0,). `call.update` is None"""
