"""Small losses on the CPU, whose time is that of calls and not of arithmetic: through PyTorch's own operators, whose
derivatives need no Python (benchmarks/NOTES.md, "Small losses")."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4kernels import _ext
from m4kernels._library import sees_calls

# Up to so many logits PyTorch's operators are the faster ones (measured in turns, the same place).
MOST_LOGITS = 2**15
_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64)


def linear_cross_entropy(
    x: Any, weight: Any, targets: Any, token_weight: Any, vocab_limit: Any, ignore_index: Any, max_workspace_bytes: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(loss (), differentiable; nll (T,); correct bool (T,)) of a call that is small and plain, in which every token is
    valid. Else None: the op does the rest, refuses what does not fit, and lets an ignored token influence nothing,
    whatever its x holds.
    """
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or type(targets) is not Tensor or vocab_limit is not None:
        return None
    shape, classes, dtype = x.shape, weight.shape, x.dtype
    if len(shape) != 2 or len(classes) != 2 or not 0 < shape[0] * classes[0] <= MOST_LOGITS or shape[1] != classes[1]:
        return None
    tokens = shape[0]
    if not (
        dtype in _DTYPES
        and weight.dtype is dtype
        and targets.dtype is torch.int64
        and targets.shape == shape[:1]
        and x.is_cpu
        and weight.is_cpu
        and targets.is_cpu
        and targets.is_contiguous()
        and x.layout is weight.layout is targets.layout is torch.strided
        and type(ignore_index) is int
        and ignore_index < 0
        and type(max_workspace_bytes) is int
        and max_workspace_bytes >= 2 * tokens * classes[0] * dtype.itemsize
        and not (sees_calls() or torch.is_autocast_enabled("cpu") or x.is_neg() or weight.is_neg())
    ):
        return None
    if token_weight is not None and not (
        type(token_weight) is Tensor
        and token_weight.dtype is dtype
        and token_weight.shape == shape[:1]
        and token_weight.is_cpu
        and not token_weight.requires_grad
    ):
        return None
    extension, at = _ext.load(), targets.data_ptr()
    if extension is None or not extension.lce_are_classes(targets=at, tokens=tokens, classes=classes[0]):
        return None
    logits = F.linear(x, weight)
    log_softmax = torch.log_softmax(logits, 1)  # with nll_loss the two operators of F.cross_entropy
    nll, correct = torch.empty(tokens, dtype=dtype), torch.empty(tokens, dtype=torch.bool)
    (extension.lce_whole_f32 if dtype is torch.float32 else extension.lce_whole_f64)(
        logits=logits.data_ptr(),
        log_softmax=log_softmax.data_ptr(),
        targets=at,
        nll=nll.data_ptr(),
        correct=correct.data_ptr(),
        tokens=tokens,
        classes=classes[0],
    )
    if token_weight is None:
        return F.nll_loss(log_softmax, targets), nll, correct
    return torch.dot(F.nll_loss(log_softmax, targets, reduction="none"), token_weight), nll, correct
