"""Where each backend of an op is tested: one body of a test serves all of them."""

import importlib.util
from typing import Any

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def targets(*backends: str, interpreter: bool = True) -> list[Any]:
    """Parameters `(backend, device)`: "cpp" on the CPU, "reference" on the CPU and on CUDA, "triton" on CUDA or, where
    there is none, on the CPU through Triton's interpreter (keep its shapes small; not with `interpreter=False`),
    "cuda" on CUDA.

    Those on CUDA are marked `cuda` and skipped without a device.
    """
    cuda = torch.cuda.is_available()
    on_cuda = [pytest.mark.cuda, pytest.mark.skipif(not cuda, reason="needs a CUDA device")]
    out = []
    for name in backends:
        if name in ("cpp", "reference"):
            out.append(pytest.param((name, "cpu"), id=name))
        if name == "triton" and interpreter and not cuda:
            without = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
            out.append(pytest.param((name, "cpu"), id="triton interpreter", marks=without))
        elif name != "cpp":
            out.append(pytest.param((name, "cuda"), id=f"{name} cuda", marks=on_cuda))
    return out
