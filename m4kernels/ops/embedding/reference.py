"""The gradient of embedding in PyTorch: the specification of every other backend."""

import torch
from torch import Tensor

from m4kernels.backend import runs_always
from m4kernels.ops.embedding.arguments import EmbeddingArguments

can_run = runs_always


def embedding_backward(call: EmbeddingArguments) -> Tensor:
    """(V, D) the sums of its tokens' gradients for every row, in the order of the tokens; 0 where it has none."""
    return torch.ops.aten.embedding_dense_backward(call.values, call.ids, call.rows, -1, False)
