"""Coordinate quantisation in plain PyTorch: the specification of every other backend."""

import torch
from torch import Tensor

from m4kernels._dtypes import compute_dtype
from m4kernels.backend import runs_always
from m4kernels.ops.quantize_coords.arguments import DequantizeArguments, QuantizeArguments

can_run = runs_always


def quantize_coords(call: QuantizeArguments) -> Tensor:
    """int64 (..., 3 J)"""
    xy, visible, scale, offset, canvas, bins = call
    c = xy.to(compute_dtype(xy.dtype))
    per_sample = (*xy.shape[:-2], 2)
    if scale is not None:
        c = c * scale.to(c.dtype).expand(per_sample).unsqueeze(-2)
    if offset is not None:
        c = c + offset.to(c.dtype).expand(per_sample).unsqueeze(-2)
    # 0-dimensional tensors, because dividing a CUDA tensor by a Python number multiplies by its rounded reciprocal.
    canvas_t = torch.full((), canvas, dtype=c.dtype, device=c.device)
    last_bin = torch.full((), bins - 1, dtype=c.dtype, device=c.device)
    finite = c.isfinite()
    t = torch.round(c / canvas_t * last_bin)  # torch.round is half-to-even
    t = torch.where(finite, t, 0).clamp(0, bins - 1)
    inside = (finite & (c >= 0) & (c <= canvas_t)).all(-1)
    tokens = t.to(torch.int64)
    return torch.cat([tokens[..., 0], tokens[..., 1], (visible & inside).to(torch.int64)], dim=-1)


def dequantize_coords(call: DequantizeArguments) -> tuple[Tensor, Tensor]:
    """xy float32 (..., J, 2), visible bool (..., J)"""
    tokens, canvas, bins = call
    x, y, seen = tokens.to(torch.int64).unflatten(-1, (3, tokens.shape[-1] // 3)).unbind(-2)
    canvas_t = torch.full((), canvas, dtype=torch.float32, device=tokens.device)
    last_bin = torch.full((), bins - 1, dtype=torch.float32, device=tokens.device)
    return torch.stack([x, y], dim=-1).to(torch.float32) / last_bin * canvas_t, seen != 0
