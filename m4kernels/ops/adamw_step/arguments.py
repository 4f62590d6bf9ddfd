"""The arguments of one call of adamw_step, checked; what every backend receives."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m4kernels.backend import Backend

OP = "adamw_step"
DTYPES = (torch.float32, torch.float64)


class AdamWArguments(NamedTuple):
    """One call of the op; N tensors of any shapes, as in `api.adamw_step`."""

    params: Sequence[Tensor]  # N
    grads: Sequence[Tensor]  # N, each of the shape of its parameter, and so below
    exp_avgs: Sequence[Tensor]  # N
    exp_avg_sqs: Sequence[Tensor]  # N
    steps: Sequence[Tensor]  # N, each ()
    lr: Tensor  # () float64
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_factor: Tensor | None  # ()
    found_inf: Tensor | None  # ()

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def check_structure(self) -> None:
        """Raise ValueError where lengths, shapes, dtypes, devices or numbers do not fit; reads no values of tensors."""
        params, beside = self.params, {name: getattr(self, name) for name in ("grads", "exp_avgs", "exp_avg_sqs")}
        for name, tensors in (*beside.items(), ("steps", self.steps)):
            if len(tensors) != len(params):
                raise ValueError(f"{OP}: {name} has {len(tensors)} tensors, params {len(params)}; expected as many")
        device, dtype = params[0].device, params[0].dtype
        if dtype not in DTYPES:
            raise ValueError(f"{OP}: params must be float32 or float64, got {dtype}")
        kind = (device, dtype)
        for i, (param, step) in enumerate(zip(params, self.steps, strict=True)):
            shape = param.shape
            if (param.device, param.dtype) != kind:
                raise ValueError(
                    f"{OP}: params[{i}] is {param.dtype} on {param.device}, params[0] {dtype} on {device}; "
                    "expected one dtype and device"
                )
            for name, tensors in beside.items():
                one = tensors[i]
                if one.shape != shape or (one.device, one.dtype) != kind:
                    raise ValueError(
                        f"{OP}: {name}[{i}] must be as params[{i}], {tuple(shape)} {dtype} on {device}, "
                        f"got {tuple(one.shape)} {one.dtype} on {one.device}"
                    )
            self._check_number(f"steps[{i}]", step, device)
        for name, number in (("grad_factor", self.grad_factor), ("found_inf", self.found_inf)):
            if number is not None:
                self._check_number(name, number, device)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{OP}: {name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("eps", "weight_decay"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{OP}: {name} must be at least 0 and finite, got {getattr(self, name)}")

    @staticmethod
    def _check_number(name: str, number: Tensor, device: torch.device) -> None:
        if number.dim() or number.dtype is not torch.float32 or number.device != device:
            raise ValueError(
                f"{OP}: {name} must be a float32 tensor of shape () on {device}, "
                f"got {tuple(number.shape)} {number.dtype} on {number.device}"
            )


class AdamWBackend(Backend, Protocol):
    """What a backend of this op has."""

    def adamw_step(self, call: AdamWArguments) -> None:
        """Change params, exp_avgs, exp_avg_sqs and steps in place, or, where found_inf is not 0, nothing."""
