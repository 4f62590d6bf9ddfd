"""quantize_coords on a GPU, through csrc/quantize_coords/quantize_coords_cuda.cu."""

import torch
from torch import Tensor

from m4kernels import _cuda, _ext
from m4kernels._dtypes import compute_dtype
from m4kernels.dispatch import runs_always
from m4kernels.ops.quantize_coords.cpp import per_sample

can_run = runs_always


def quantize_coords(
    xy: Tensor, visible: Tensor, scale: Tensor | None, offset: Tensor | None, canvas: float, bins: int
) -> Tensor:
    """xy (..., J, 2), visible (..., J), scale and offset broadcastable to (..., 2) → int64 (..., 3 J)."""
    with _cuda.current_stream(xy.device) as where:
        return _quantize("cuda", where, xy, visible, scale, offset, canvas, bins)


def dequantize_coords(tokens: Tensor, canvas: float, bins: int) -> tuple[Tensor, Tensor]:
    """tokens (..., 3 J) → xy float32 (..., J, 2), visible bool (..., J)."""
    with _cuda.current_stream(tokens.device) as where:
        return _dequantize("cuda", where, tokens, canvas, bins)


def _quantize(
    target: str,
    where: tuple[int, int],
    xy: Tensor,
    visible: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    canvas: float,
    bins: int,
) -> Tensor:
    """The op on "cuda" at (device, stream), or on "host", where tests run its block programs, at (seed, 0)."""
    dtype = compute_dtype(xy.dtype)
    batch, joints = xy.shape[:-2], xy.shape[-2]
    xy = _cuda.aligned(xy.to(dtype))
    visible = visible.contiguous()
    scale, scale_step = per_sample(scale, (*batch, 2), dtype)
    offset, offset_step = per_sample(offset, (*batch, 2), dtype)
    scale = None if scale is None else _cuda.aligned(scale)
    offset = None if offset is None else _cuda.aligned(offset)
    tokens = torch.empty((*batch, 3 * joints), dtype=torch.int64, device=xy.device)
    bits = "f64" if dtype == torch.float64 else "f32"
    getattr(_ext.require(), f"quantize_coords_{bits}_{target}")(
        *(xy.data_ptr(), visible.data_ptr()),
        *(0 if value is None else value.data_ptr() for value in (scale, offset)),
        *(scale_step, offset_step, tokens.data_ptr(), batch.numel(), joints, canvas, bins, *where),
    )
    return tokens


def _dequantize(target: str, where: tuple[int, int], tokens: Tensor, canvas: float, bins: int) -> tuple[Tensor, Tensor]:
    batch, joints = tokens.shape[:-1], tokens.shape[-1] // 3
    tokens = _cuda.aligned(tokens.to(torch.int64))
    xy = torch.empty((*batch, joints, 2), dtype=torch.float32, device=tokens.device)
    visible = torch.empty((*batch, joints), dtype=torch.bool, device=tokens.device)
    getattr(_ext.require(), f"dequantize_coords_{target}")(
        *(tokens.data_ptr(), xy.data_ptr(), visible.data_ptr(), batch.numel(), joints, canvas, bins, *where)
    )
    return xy, visible
