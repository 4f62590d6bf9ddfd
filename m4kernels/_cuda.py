"""What the CUDA C++ backends share: where a kernel is to run, and tensors as the kernels want them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def current_stream(device: torch.device) -> Iterator[dict[str, int]]:
    """Arguments of every launch: index of the device, address of its current stream; the device is the current one
    meanwhile."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        yield {"device": stream.device.index, "stream": stream.cuda_stream}


def aligned(x: Tensor) -> Tensor:
    """x contiguous and beginning at a multiple of 16 bytes, copied where it is not: kernels load up to 16 at once."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
