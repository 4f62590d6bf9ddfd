"""quantize_coords on a GPU, through csrc/quantize_coords/quantize_coords_cuda.cu."""

import torch
from torch import Tensor

from m4kernels import _cuda, _ext
from m4kernels._dtypes import compute_dtype
from m4kernels.backend import runs_always
from m4kernels.ops.quantize_coords.arguments import DequantizeArguments, QuantizeArguments
from m4kernels.ops.quantize_coords.cpp import per_sample

can_run = runs_always


def quantize_coords(call: QuantizeArguments) -> Tensor:
    """int64 (..., 3 J)"""
    with _cuda.current_stream(call.device) as where:
        return _quantize("cuda", where, call)


def dequantize_coords(call: DequantizeArguments) -> tuple[Tensor, Tensor]:
    """xy float32 (..., J, 2), visible bool (..., J)"""
    with _cuda.current_stream(call.device) as where:
        return _dequantize("cuda", where, call)


def _quantize(target: str, where: dict[str, int], call: QuantizeArguments) -> Tensor:
    """The op on "cuda" with device and stream, or on "host", where tests run its programs, with order and threads."""
    xy, visible, scale, offset, canvas, bins = call
    dtype = compute_dtype(xy.dtype)
    batch, joints = xy.shape[:-2], xy.shape[-2]
    xy = _cuda.aligned(xy.to(dtype))
    visible = visible.contiguous()
    scale_step = offset_step = 0
    if scale is not None:
        scale, scale_step = per_sample(scale, (*batch, 2), dtype)
        scale = _cuda.aligned(scale)
    if offset is not None:
        offset, offset_step = per_sample(offset, (*batch, 2), dtype)
        offset = _cuda.aligned(offset)
    tokens = torch.empty((*batch, 3 * joints), dtype=torch.int64, device=xy.device)
    bits = "f64" if dtype == torch.float64 else "f32"
    getattr(_ext.require(), f"quantize_coords_{bits}_{target}")(
        xy=xy.data_ptr(),
        visible=visible.data_ptr(),
        scale=0 if scale is None else scale.data_ptr(),
        offset=0 if offset is None else offset.data_ptr(),
        scale_step=scale_step,
        offset_step=offset_step,
        tokens=tokens.data_ptr(),
        n=batch.numel(),
        joints=joints,
        canvas=canvas,
        bins=bins,
        **where,
    )
    return tokens


def _dequantize(target: str, where: dict[str, int], call: DequantizeArguments) -> tuple[Tensor, Tensor]:
    tokens, canvas, bins = call
    batch, joints = tokens.shape[:-1], tokens.shape[-1] // 3
    tokens = _cuda.aligned(tokens.to(torch.int64))
    xy = torch.empty((*batch, joints, 2), dtype=torch.float32, device=tokens.device)
    visible = torch.empty((*batch, joints), dtype=torch.bool, device=tokens.device)
    getattr(_ext.require(), f"dequantize_coords_{target}")(
        tokens=tokens.data_ptr(),
        xy=xy.data_ptr(),
        visible=visible.data_ptr(),
        n=batch.numel(),
        joints=joints,
        canvas=canvas,
        bins=bins,
        **where,
    )
    return xy, visible
