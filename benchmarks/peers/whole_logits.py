"""Linear layer and cross-entropy with all logits in memory."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def packed(x: Tensor, weight: Tensor, targets: Tensor, vocab_limit: Tensor | None) -> Tensor:
    """Loss of packed tokens x (T, D), the mean over valid targets (T,)."""
    valid = targets >= 0
    x, targets = x[valid], targets[valid]
    logits = x @ weight.T
    if vocab_limit is not None:
        beyond = torch.arange(weight.shape[0], device=x.device) >= vocab_limit[valid].unsqueeze(1)
        logits = logits.masked_fill(beyond, -torch.inf)
    return F.cross_entropy(logits, targets)


def padded(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss of padded slots x (N, D), those with target -100 included in the product, as a padded decoder does it."""
    return F.cross_entropy(x @ weight.T, targets)


@functools.cache
def compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`padded` through torch.compile."""
    return torch.compile(padded)
