"""What the Triton backends share. Importing it does not import triton."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def launch_on(x: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of `x` the current one, on which Triton launches; nothing for a CPU tensor (the interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def bfloat16_unfit(device: torch.device) -> str | None:
    """Why Triton cannot compute in bfloat16 on a device; None when it can."""
    if device.type != "cuda":
        return None
    major, minor = _capability(device)
    if major >= 8:
        return None
    return (
        f"bfloat16 needs a GPU of compute capability 8.0 or more, this one has {major}.{minor}: use float16 or float32"
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
