"""adamw_step on the CPU, through csrc/adamw_step."""

import torch
from torch import Tensor

from m4kernels import _ext
from m4kernels.ops.adamw_step.arguments import AdamWArguments


def can_run(call: AdamWArguments) -> str | None:
    """None when it can run this call; else the reason why not."""
    if call.params[0].dtype is not torch.float32:
        return f"it computes in float32, params are {call.params[0].dtype}"
    for i, (param, exp_avg, exp_avg_sq) in enumerate(zip(call.params, call.exp_avgs, call.exp_avg_sqs, strict=True)):
        if not (_is_dense(param) and exp_avg.stride() == exp_avg_sq.stride() == param.stride()):
            return f"params[{i}] and its moments must lie in memory alike and without gaps"
    return None


def adamw_step(call: AdamWArguments) -> None:
    """Change params, exp_avgs, exp_avg_sqs and steps in place, or, where found_inf is not 0, nothing."""
    rows: list[int] = []
    kept = []  # gradients that lie in memory otherwise
    for param, grad, exp_avg, exp_avg_sq, step in zip(
        call.params, call.grads, call.exp_avgs, call.exp_avg_sqs, call.steps, strict=True
    ):
        if grad.stride() != param.stride():
            grad = torch.empty_like(param).copy_(grad)
            kept.append(grad)
        rows += (
            param.data_ptr(),
            grad.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            step.data_ptr(),
            param.numel(),
        )
    table = torch.tensor(rows, dtype=torch.int64)
    _ext.require().adamw_step_f32(
        table=table.data_ptr(),
        grad_factor=0 if call.grad_factor is None else call.grad_factor.data_ptr(),
        found_inf=0 if call.found_inf is None else call.found_inf.data_ptr(),
        lr=call.lr.data_ptr(),
        tensors=len(call.params),
        beta1=call.beta1,
        beta2=call.beta2,
        eps=call.eps,
        weight_decay=call.weight_decay,
        threads=torch.get_num_threads(),
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one piece of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    size = 1
    for stride, length in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= length
    return True
