"""quantize_coords on the CPU, through csrc/quantize_coords."""

import math

import torch
from torch import Tensor

from m4kernels import _ext, _memory
from m4kernels._dtypes import compute_dtype
from m4kernels.backend import runs_always
from m4kernels.ops.quantize_coords.arguments import DequantizeArguments, QuantizeArguments

_LARGE = _memory.SMALLEST // 24  # joints: a call of a few microseconds does not ask

can_run = runs_always


def quantize_coords(call: QuantizeArguments) -> Tensor:
    """int64 (..., 3 J)"""
    xy, visible, scale, offset, canvas, bins = call
    dtype = compute_dtype(xy.dtype)
    *batch, joints, _ = xy.shape
    count = math.prod(batch)
    xy = (xy if xy.dtype is dtype else xy.to(dtype)).contiguous()
    visible = visible.contiguous()
    scale_step = offset_step = 0
    if scale is not None or offset is not None:
        pairs = (*batch, 2)
        scale, scale_step = (None, 0) if scale is None else per_sample(scale, pairs, dtype)
        offset, offset_step = (None, 0) if offset is None else per_sample(offset, pairs, dtype)
    shape = (*batch, 3 * joints)
    # A large one where an earlier one was: page faults would take three times as long as all the rest.
    tokens = torch.empty(shape, dtype=torch.int64) if count * joints < _LARGE else _memory.empty(shape, torch.int64)
    extension = _ext.require()
    kernel = extension.quantize_coords_f64 if dtype is torch.float64 else extension.quantize_coords_f32
    kernel(
        xy=xy.data_ptr(),
        visible=visible.data_ptr(),
        scale=0 if scale is None else scale.data_ptr(),
        offset=0 if offset is None else offset.data_ptr(),
        scale_step=scale_step,
        offset_step=offset_step,
        tokens=tokens.data_ptr(),
        n=count,
        joints=joints,
        canvas=canvas,
        bins=bins,
        threads=torch.get_num_threads(),
    )
    return tokens


def dequantize_coords(call: DequantizeArguments) -> tuple[Tensor, Tensor]:
    """xy float32 (..., J, 2), visible bool (..., J)"""
    tokens, canvas, bins = call
    *batch, width = tokens.shape
    joints = width // 3
    tokens = tokens.to(torch.int64).contiguous()
    xy = torch.empty((*batch, joints, 2), dtype=torch.float32)
    visible = torch.empty((*batch, joints), dtype=torch.bool)
    _ext.require().dequantize_coords(
        tokens=tokens.data_ptr(),
        xy=xy.data_ptr(),
        visible=visible.data_ptr(),
        n=math.prod(batch),
        joints=joints,
        canvas=canvas,
        bins=bins,
        threads=torch.get_num_threads(),
    )
    return xy, visible


def per_sample(value: Tensor, pairs: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    """(contiguous values, elements from one sample's pair to the next: 2, or 0 when all samples share one pair)."""
    if value.dtype != dtype:
        value = value.to(dtype)
    if value.shape == pairs:
        return value.contiguous(), 2
    if value.shape[:-1].numel() == 1:
        return value.reshape(-1).expand(2).contiguous(), 0
    return value.expand(pairs).contiguous(), 2
