"""The arguments of one call of embedding and of its gradient, checked; what every backend receives."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m4kernels.backend import Backend

OP = "embedding"


class EmbeddingArguments(NamedTuple):
    """One call of the op, or of its gradient; shapes as in `api.embedding`."""

    values: Tensor  # (V, D) the weight; for the gradient (T, D), that of the result
    ids: Tensor  # (T,)
    rows: int  # V

    @property
    def device(self) -> torch.device:
        return self.values.device

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes or devices do not fit; reads no values."""
        values, ids, _ = self
        if values.dim() != 2 or not values.is_floating_point():
            raise ValueError(f"{OP}: weight must be floating (V, D), got {values.dtype} {tuple(values.shape)}")
        if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{OP}: ids must be int64 or int32 (T,), got {ids.dtype} {tuple(ids.shape)}")
        if ids.device != values.device:
            raise ValueError(f"{OP}: ids is on {ids.device}, weight on {values.device}; expected one device")

    def check_gradient(self) -> None:
        """`check_structure` of a call of the gradient."""
        self.check_structure()
        if self.values.shape[0] != self.ids.shape[0]:
            raise ValueError(
                f"{OP}: the gradient must be of {self.ids.shape[0]} tokens, got {tuple(self.values.shape)}"
            )


class EmbeddingBackend(Backend, Protocol):
    """What a backend of this op has."""

    def embedding_backward(self, call: EmbeddingArguments) -> Tensor:
        """(V, D) the sums of its tokens' gradients for every row, in the order of the tokens; 0 where it has none."""
