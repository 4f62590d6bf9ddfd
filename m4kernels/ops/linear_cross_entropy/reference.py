"""Linear layer and cross-entropy in plain PyTorch, a chunk of tokens at a time: the specification of every other
backend. The gradients are computed beside the loss, while a chunk's logits exist."""

from collections.abc import Iterator

import torch
from torch import Tensor

from m4kernels.ops.linear_cross_entropy.arguments import LossArguments


def can_run(*_args: object) -> None:
    """The reference runs everywhere."""


def linear_cross_entropy(call: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), nll (T,), correct bool (T,), d loss / d x (T, D), d loss / d weight (V, D)); the floating ones in
    `call.result_dtype`, a gradient that is not wanted has shape (0,).

    An ignored token has no influence on anything, even where x or its token_weight holds NaN.
    """
    dtype, classes = call.result_dtype, call.weight.shape[0]
    tokens = call.x.shape[0]
    valid = call.targets != call.ignore_index
    scale = token_scale(call, valid)
    target = torch.where(valid, call.targets, 0).unsqueeze(1)
    limit = None if call.vocab_limit is None else torch.where(valid, call.vocab_limit, classes).int().unsqueeze(1)
    class_ids = torch.arange(classes, dtype=torch.int32, device=call.x.device)

    nll = call.x.new_zeros(tokens, dtype=dtype)
    correct = torch.zeros_like(valid)
    dx = call.x.new_zeros(call.x.shape if call.x_grad else 0, dtype=dtype)
    dweight = call.x.new_zeros(call.weight.shape if call.weight_grad else 0, dtype=dtype)

    chunk, block = _chunk_sizes(call)
    workspace = call.x.new_empty(chunk, classes, dtype=dtype)
    for first in range(0, tokens, chunk):
        rows = slice(first, first + chunk)
        ignored = ~valid[rows].unsqueeze(1)
        x = call.x[rows].to(call.operand_dtype).to(dtype).masked_fill(ignored, 0)
        logits = workspace[: x.shape[0]]
        for part, weight in _weight_blocks(call, block):
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
        for part, weight in _weight_blocks(call, block):
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


def _chunk_sizes(call: LossArguments) -> tuple[int, int]:
    """(tokens, classes) handled at a time within the workspace.

    A weight of lower precision than the result is converted a block of classes at a time, so that its copy, too, fits.
    """
    classes, dim = call.weight.shape
    size = call.result_dtype.itemsize
    # Logits, the mask of classes beyond the limit, x converted and masked, and a few numbers.
    token_bytes = classes * (size + (call.vocab_limit is not None)) + 3 * dim * size + 64
    converts = call.weight.dtype != call.result_dtype or call.operand_dtype != call.result_dtype
    class_bytes = 2 * dim * size if converts else 0
    # What does not depend on the chunk: one integer a class, and a few vectors over all tokens.
    fixed = 4 * classes + 32 * call.x.shape[0]
    call.require_workspace(fixed + token_bytes + class_bytes)
    room = call.max_workspace_bytes - fixed
    block = classes
    if converts:
        block = min(classes, max(1, min(room // 4, room - token_bytes) // class_bytes))
    chunk = (room - block * class_bytes) // token_bytes
    return max(1, min(chunk, call.x.shape[0])), block


def _weight_blocks(call: LossArguments, block: int) -> Iterator[tuple[slice, Tensor]]:
    """The weight in blocks of classes, rounded to the operands' dtype and converted to the result's."""
    for first in range(0, call.weight.shape[0], block):
        part = slice(first, first + block)
        yield part, call.weight[part].to(call.operand_dtype).to(call.result_dtype)
