"""Public function adamw_step and its registration with torch.library."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m4kernels import _checks
from m4kernels._library import define_in_place
from m4kernels.dispatch import Dispatcher
from m4kernels.ops.adamw_step.arguments import OP, AdamWArguments, AdamWBackend

dispatcher: Dispatcher[AdamWBackend] = Dispatcher(OP, ("cpp", "reference"), AdamWBackend)


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],  # each ()
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_factor: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    backend: str | None = None,
) -> None:
    """One step of `torch.optim.AdamW` over all parameters, in place, with gradients `grad_factor * grad`.

    With g = grad_factor · grad and t = step + 1: exp_avg ← β₁ exp_avg + (1 - β₁) g; exp_avg_sq ← β₂ exp_avg_sq +
    (1 - β₂) g²; param ← (1 - lr · weight_decay) param - lr / (1 - β₁ᵗ) · exp_avg / (√exp_avg_sq / √(1 - β₂ᵗ) + eps);
    step ← t (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019). Clipping's factor is folded in, so
    gradients are read once and not written. Nothing is differentiated, and no value is read on the host.

    Runs give the same bits for every number of threads, and with AVX2 and AVX-512.

    Args:
        params: float32 or float64, all of one dtype and device.
        grads: the gradient of each, of its shape, dtype and device; likewise the moments.
        exp_avgs, exp_avg_sqs: moments of the gradient, of its square.
        steps: float32 tensors of shape () on that device, the steps taken before, as torch's fused AdamW has them.
        lr: learning rate.
        betas: in [0, 1), how slowly the moments forget.
        eps, weight_decay: at least 0.
        grad_factor: float32; default 1.
        found_inf: float32; where it is not 0 nothing changes. Default 0.
        backend: "cpp" (float32 on a CPU), "reference" or "auto", the fastest that can run; default what the variable
            M4KERNELS_BACKEND names, else auto.

    Raises:
        ValueError: a length, shape, dtype, device or number does not fit; the message names the argument.
    """
    if not len(params) == len(grads):  # an op of PyTorch's cannot say what is wrong with an empty list
        raise ValueError(f"{OP}: grads has {len(grads)} tensors, params {len(params)}; expected as many")
    if not len(params):
        return
    if not isinstance(lr, Tensor):
        lr = torch.tensor(_checks.number(f"{OP}: lr", lr), dtype=torch.float64, device=params[0].device)
    if lr.dim():
        raise ValueError(f"{OP}: lr must be a number or a tensor of shape (), got shape {tuple(lr.shape)}")
    beta1, beta2 = (_checks.number(f"{OP}: betas", beta) for beta in betas)
    eps, weight_decay = _checks.number(f"{OP}: eps", eps), _checks.number(f"{OP}: weight_decay", weight_decay)
    lists = (list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps))
    with torch.no_grad():
        _op(*lists, lr.double(), beta1, beta2, eps, weight_decay, grad_factor, found_inf, backend or "")


def _step(*args: Any) -> None:
    call = AdamWArguments(*args[:-1])
    call.check_structure()
    dispatcher.select(args[-1], call).adamw_step(call)


def _fake(*args: Any) -> None:
    AdamWArguments(*args[:-1]).check_structure()


_op = define_in_place(
    f"{OP}(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps,"
    " Tensor lr, float beta1, float beta2, float eps, float weight_decay, Tensor? grad_factor, Tensor? found_inf,"
    " str backend) -> ()",
    _step,
    _fake,
    changes=(0, 2, 3, 4),
)
