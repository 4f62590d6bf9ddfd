"""What the Triton backends share. Importing it does not import triton."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def launch_on(x: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of `x` the current one, on which Triton launches; nothing for a CPU tensor (the interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
