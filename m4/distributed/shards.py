"""Tensors of which every rank holds a part (`DTensor`s, as FSDP makes them), whole and in parts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_divided(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a tensor of which every rank holds a part.

    Where nothing has imported DTensor there is none; its import takes as long as half of torch's, so a command that
    needs none is spared it.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; the tensor itself where it is in one piece."""
    return tensor.to_local() if is_divided(tensor) else tensor


def like(whole: Tensor, model: Tensor) -> Tensor:
    """``whole``, which every rank has, divided as ``model`` is: this rank keeps its part."""
    if not is_divided(model):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole.to(model.device),
        model.device_mesh,
        model.placements,
        src_data_rank=None,  # nothing is sent
    )


def rows_below(count: int, tensor: Tensor) -> int:
    """How many of the first ``count`` rows of a tensor are in this rank's part; they are the first of that part."""
    return int((local_part(like(torch.arange(len(tensor)), tensor)) < count).sum())


@torch.no_grad()
def gathered(tree: Any, keep: bool) -> Any:
    """A tree of dicts, lists and tuples with every divided tensor whole, in the memory of the host.

    All ranks call it with the same tree; only those that ``keep`` have a use for the result, the others hold no more
    than one whole tensor at a time, and get None in their places.
    """
    if is_divided(tree):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, keep) for value in tree)
    return tree
