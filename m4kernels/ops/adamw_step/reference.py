"""One step of AdamW in plain PyTorch: the specification of every other backend."""

import torch

from m4kernels.backend import runs_always
from m4kernels.ops.adamw_step.arguments import AdamWArguments

can_run = runs_always


def adamw_step(call: AdamWArguments) -> None:
    """Change params, exp_avgs, exp_avg_sqs and steps in place, or, where found_inf is not 0, nothing."""
    beta1, beta2 = call.beta1, call.beta2
    for param, grad, exp_avg, exp_avg_sq, step in zip(
        call.params, call.grads, call.exp_avgs, call.exp_avg_sqs, call.steps, strict=True
    ):
        skip = torch.zeros_like(step, dtype=torch.bool) if call.found_inf is None else call.found_inf != 0
        g = grad if call.grad_factor is None else grad * call.grad_factor
        first = torch.lerp(exp_avg, g, 1.0 - beta1)
        second = beta2 * exp_avg_sq + (1.0 - beta2) * g * g
        # What all elements share, in double precision.
        count = step.double() + 1.0
        keep = 1.0 - call.lr * call.weight_decay
        size = call.lr / (1.0 - beta1**count)
        root = (1.0 - beta2**count).sqrt()
        updated = keep * param - size * first / (second.sqrt() / root + call.eps)
        for tensor, changed in ((param, updated), (exp_avg, first), (exp_avg_sq, second), (step, count)):
            tensor.copy_(torch.where(skip, tensor, changed.to(tensor.dtype)))
