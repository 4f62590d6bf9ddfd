"""quantize_coords on the CPU, through csrc/quantize_coords."""

import math

import torch
from torch import Tensor

from m4kernels import _ext
from m4kernels._dtypes import compute_dtype
from m4kernels.dispatch import runs_always

can_run = runs_always


def quantize_coords(
    xy: Tensor, visible: Tensor, scale: Tensor | None, offset: Tensor | None, canvas: float, bins: int
) -> Tensor:
    """xy (..., J, 2), visible (..., J), scale and offset broadcastable to (..., 2) → int64 (..., 3 J)."""
    dtype = compute_dtype(xy.dtype)
    *batch, joints, _ = xy.shape
    xy = (xy if xy.dtype == dtype else xy.to(dtype)).contiguous()
    visible = visible.contiguous()
    pairs = (*batch, 2)
    scale, scale_step = per_sample(scale, pairs, dtype)
    offset, offset_step = per_sample(offset, pairs, dtype)
    tokens = torch.empty((*batch, 3 * joints), dtype=torch.int64)
    extension = _ext.require()
    kernel = extension.quantize_coords_f64 if dtype == torch.float64 else extension.quantize_coords_f32
    kernel(
        xy.data_ptr(),
        visible.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if offset is None else offset.data_ptr(),
        scale_step,
        offset_step,
        tokens.data_ptr(),
        math.prod(batch),
        joints,
        canvas,
        bins,
        torch.get_num_threads(),
    )
    return tokens


def dequantize_coords(tokens: Tensor, canvas: float, bins: int) -> tuple[Tensor, Tensor]:
    """tokens (..., 3 J) → xy float32 (..., J, 2), visible bool (..., J)."""
    batch, joints = tokens.shape[:-1], tokens.shape[-1] // 3
    tokens = tokens.to(torch.int64).contiguous()
    xy = torch.empty((*batch, joints, 2), dtype=torch.float32)
    visible = torch.empty((*batch, joints), dtype=torch.bool)
    _ext.require().dequantize_coords(
        tokens.data_ptr(),
        xy.data_ptr(),
        visible.data_ptr(),
        batch.numel(),
        joints,
        canvas,
        bins,
        torch.get_num_threads(),
    )
    return xy, visible


def per_sample(value: Tensor | None, pairs: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """(contiguous values, elements from one sample's pair to the next: 2, or 0 when all samples share one pair)."""
    if value is None:
        return None, 0
    if value.dtype != dtype:
        value = value.to(dtype)
    if value.shape == pairs:
        return value.contiguous(), 2
    if value.shape[:-1].numel() == 1:
        return value.reshape(-1).expand(2).contiguous(), 0
    return value.expand(pairs).contiguous(), 2
