"""Where tokenizers and captioners run, and in what precision."""

from __future__ import annotations

import os

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def default_device() -> torch.device:
    """This process's GPU (``LOCAL_RANK`` under torchrun), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def default_dtype(device: torch.device) -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bf16" if device.type == "cuda" else "fp32"
