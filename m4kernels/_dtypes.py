"""Dtype rules that the ops share."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic's dtype: float64 stays, every other float is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
