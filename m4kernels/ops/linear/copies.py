"""bfloat16 copies of float32 weights, made once while the weights are known to stay as they are.

A training step multiplies the same weights with every micro-batch, forward and backward. Between `begin` and `end` a
weight is rounded when it is first used and then read from its copy: half the bytes, and no rounding as it is packed.
Nothing is kept of what is no parameter. A copy's memory stays for the next step, until the parameter is gone.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class _Copy(NamedTuple):
    of: "weakref.ref[Tensor]"
    state: tuple[int, int, int]  # of the weight when it was rounded
    rounded: Tensor


_copies: dict[int, _Copy] = {}
_step = 0  # the number of `begin`s, negative after an `end`


def begin() -> None:
    """From here to `end` parameters stay as they are, but for changes that their version counters tell."""
    global _step
    _step = abs(_step) + 1


def end() -> None:
    """Parameters may change now; weights are read as they are."""
    global _step
    _step = -abs(_step)


def held() -> int:
    """Bytes of all copies."""
    return sum(copy.rounded.nbytes for copy in _copies.values())


def rounded(weight: Tensor) -> Tensor:
    """A float32 parameter in bfloat16, of its values now; anything else, and outside a step all, as it is."""
    if _step <= 0 or weight.dtype != torch.float32 or not (weight.is_leaf and weight.requires_grad):
        return weight
    key = id(weight)
    state = (_step, weight._version, weight.data_ptr())
    copy = _copies.get(key)
    if copy is not None and copy.of() is weight:
        if copy.state == state:
            return copy.rounded
        kept = copy.rounded
    else:
        kept = torch.empty(0)
    with torch.no_grad():
        if kept.shape == weight.shape:
            kept.copy_(weight)
        else:
            kept = weight.detach().to(torch.bfloat16, memory_format=torch.contiguous_format)
    _copies[key] = _Copy(weakref.ref(weight, lambda _: _copies.pop(key, None)), state, kept)
    return kept
