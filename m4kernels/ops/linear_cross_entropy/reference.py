"""Linear layer and cross-entropy in plain PyTorch, a chunk of tokens at a time: the specification of every other
backend. The gradients are computed beside the loss, while a chunk's logits exist."""

import torch
from torch import Tensor

from m4kernels.backend import runs_always
from m4kernels.ops.linear_cross_entropy.arguments import LossArguments

can_run = runs_always


def linear_cross_entropy(call: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), nll (T,), correct bool (T,), d loss / d x (T, D), d loss / d weight (V, D)); the floating ones in
    `call.result_dtype`, a gradient that is not wanted has shape (0,).

    An ignored token has no influence on anything, even where x or its token_weight holds NaN. Raises ValueError as
    `call.check_values` and `call.divide_workspace` do.
    """
    call.check_values()
    dtype, classes = call.result_dtype, call.weight.shape[0]
    tokens, dim = call.x.shape
    valid = call.targets != call.ignore_index
    scale = token_scale(call, valid)
    target = torch.where(valid, call.targets, 0).unsqueeze(1)
    limit = None if call.vocab_limit is None else torch.where(valid, call.vocab_limit, classes).int().unsqueeze(1)
    class_ids = torch.arange(classes, dtype=torch.int32, device=call.x.device)

    nll = call.x.new_zeros(tokens, dtype=dtype)
    correct = torch.zeros_like(valid)
    dx = call.x.new_zeros(call.x.shape if call.x_grad else 0, dtype=dtype)
    dweight = call.x.new_zeros(call.weight.shape if call.weight_grad else 0, dtype=dtype)

    # A row: its logits, the mask of its classes beyond the limit, x converted and masked, and a few numbers.
    per_row = classes * (dtype.itemsize + (limit is not None)) + 3 * dim * dtype.itemsize + 64
    # Besides: the class ids and a few vectors over all tokens.
    room, block = call.divide_workspace(4 * classes + 32 * tokens, per_row)
    chunk = max(1, min(tokens, room // per_row))
    workspace = call.x.new_empty(chunk, classes, dtype=dtype)
    for first in range(0, tokens, chunk):
        rows = slice(first, first + chunk)
        ignored = ~valid[rows].unsqueeze(1)
        x = call.x[rows].to(call.operand_dtype).to(dtype).masked_fill(ignored, 0)
        logits = workspace[: x.shape[0]]
        for part, weight in call.weight_blocks(block, classes):
            torch.mm(x, weight.T, out=logits[:, part])
        if limit is not None:
            logits.masked_fill_(class_ids >= limit[rows], -torch.inf)
        top, best = logits.max(1, keepdim=True)
        logits.sub_(top)
        target_logit = logits.gather(1, target[rows])
        total = logits.exp_().sum(1, keepdim=True)
        chunk_nll = (total.log() - target_logit).masked_fill(ignored, 0)
        nll[rows] = chunk_nll.squeeze(1)
        correct[rows] = (~ignored & (best == target[rows]) & ~chunk_nll.isnan()).squeeze(1)
        if not (call.x_grad or call.weight_grad):
            continue
        # d loss / d logits, in place: (softmax - onehot) * token_weight.
        logits.div_(total)
        logits.scatter_(1, target[rows], logits.gather(1, target[rows]) - 1)
        logits.mul_(scale[rows].unsqueeze(1)).masked_fill_(ignored, 0)
        for part, weight in call.weight_blocks(block, classes):
            if call.x_grad:
                dx[rows].addmm_(logits[:, part], weight)
            if call.weight_grad:
                dweight[part].addmm_(logits[:, part].T, x)
        if call.x_grad:
            dx[rows].masked_fill_(ignored, 0)  # 0 * weight is NaN where the weight is not finite
    return (scale * nll).sum(), nll, correct, dx, dweight


def token_scale(call: LossArguments, valid: Tensor) -> Tensor:
    """(T,): each token's factor in the loss, 0 where ignored; by default 1 / number of valid tokens."""
    if call.token_weight is None:
        return valid.to(call.result_dtype) / valid.sum().clamp(min=1)
    return torch.where(valid, call.token_weight.to(call.result_dtype), 0)
