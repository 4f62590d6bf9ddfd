"""Public functions quantize_coords and dequantize_coords, and their registration with torch.library."""

import math
from typing import Any

import torch
from torch import Tensor

from m4kernels._library import Op
from m4kernels.dispatch import Dispatcher

MAX_BINS = 2**24  # the largest range of integers that float32 holds exactly

dispatcher = Dispatcher("quantize_coords", ("cuda", "triton", "cpp", "reference"))


def quantize_coords(
    xy: Tensor,  # (..., J, 2)
    visible: Tensor,  # (..., J)
    scale: Tensor | None = None,  # broadcastable to (..., 2)
    offset: Tensor | None = None,  # broadcastable to (..., 2)
    *,
    canvas: float = 256.0,
    bins: int = 8192,
    backend: str | None = None,
) -> Tensor:
    """Tokens of 2-D joints: `round(c / canvas * (bins - 1)).clamp(0, bins - 1)` with `c = xy * scale + offset`.

    Rounding is half to even. A joint with a non-finite coordinate, or with c outside [0, canvas], becomes invisible;
    its tokens are the clamped values, 0 where non-finite. The round trip through `dequantize_coords` errs by at most
    canvas / (bins - 1) / 2 an axis for a joint on the canvas.

    Args:
        xy: floating, joint positions in source units. float64 is computed in float64, all else in float32.
        visible: bool, whether a joint is annotated as visible.
        scale: floating, from source units to canvas units (pixels); default 1.
        offset: floating, canvas units; default 0.
        canvas: side of the canvas, in canvas units.
        bins: number of quantisation bins an axis, 2 to 2**24.
        backend: "cuda", "triton", "cpp" or "reference"; default the fastest that can run. All agree bit for bit.

    Returns:
        int64 (..., 3 * J): all x tokens, then all y tokens, then visibility 0 or 1.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message names the argument.
    """
    return _quantize_op(xy, visible, scale, offset, canvas, bins, backend or "")


def dequantize_coords(
    tokens: Tensor,  # (..., 3 * J)
    *,
    canvas: float = 256.0,
    bins: int = 8192,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of `quantize_coords`: `xy = tokens / (bins - 1) * canvas`.

    Args:
        tokens: integer, all x, then all y, then visibility.
        canvas: side of the canvas, in canvas units.
        bins: number of quantisation bins an axis, 2 to 2**24.
        backend: "cuda", "triton", "cpp" or "reference"; default the fastest that can run. All agree bit for bit.

    Returns:
        (xy float32 (..., J, 2) in canvas units, visible bool (..., J)).

    Raises:
        ValueError: a shape, dtype or number does not fit; the message names the argument.
    """
    return _dequantize_op(tokens, canvas, bins, backend or "")


def _check_grid(op: str, canvas: float, bins: int) -> None:
    if not 0 < canvas < math.inf:
        raise ValueError(f"{op}: canvas must be finite and positive, got {canvas}")
    if not 2 <= bins <= MAX_BINS:
        raise ValueError(f"{op}: bins must be 2 to {MAX_BINS}, got {bins}")


def _check_quantize(
    xy: Tensor, visible: Tensor, scale: Tensor | None, offset: Tensor | None, canvas: float, bins: int
) -> None:
    op = "quantize_coords"
    _check_grid(op, canvas, bins)
    shape, device = xy.shape, xy.device
    if not xy.dtype.is_floating_point:
        raise ValueError(f"{op}: xy must be floating, got {xy.dtype}")
    if len(shape) < 2 or shape[-1] != 2:
        raise ValueError(f"{op}: xy must have shape (..., J, 2), got {tuple(shape)}")
    if visible.dtype != torch.bool:
        raise ValueError(f"{op}: visible must be bool, got {visible.dtype}")
    if visible.shape != shape[:-1]:
        raise ValueError(f"{op}: visible must have shape {tuple(shape[:-1])}, got {tuple(visible.shape)}")
    if visible.device != device:
        raise ValueError(f"{op}: visible is on {visible.device}, xy on {device}")
    target = (*shape[:-2], 2)
    for name, value in (("scale", scale), ("offset", offset)):
        if value is None:
            continue
        if not value.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{op}: {name} is on {value.device}, xy on {device}")
        have = value.shape
        fits = have == target or (
            len(have) <= len(target)
            and all(size in (1, want) for size, want in zip(reversed(have), reversed(target), strict=False))
        )
        if not fits:
            raise ValueError(f"{op}: {name} must be broadcastable to {target}, got {tuple(have)}")


def _check_dequantize(tokens: Tensor, canvas: float, bins: int) -> None:
    op = "dequantize_coords"
    _check_grid(op, canvas, bins)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{op}: tokens must be integer, got {tokens.dtype}")
    if tokens.dim() < 1 or tokens.shape[-1] % 3:
        raise ValueError(f"{op}: tokens must have shape (..., 3 * J), got {tuple(tokens.shape)}")


def _quantize(*args: Any) -> Tensor:
    *call, backend = args
    _check_quantize(*call)
    return dispatcher.select(backend, *call).quantize_coords(*call)


def _quantize_fake(xy: Tensor, *rest: Any) -> Tensor:
    _check_quantize(xy, *rest[:-1])
    return xy.new_empty((*xy.shape[:-2], 3 * xy.shape[-2]), dtype=torch.int64)


def _dequantize(*args: Any) -> tuple[Tensor, Tensor]:
    *call, backend = args
    _check_dequantize(*call)
    return dispatcher.select(backend, *call).dequantize_coords(*call)


def _dequantize_fake(tokens: Tensor, canvas: float, bins: int, backend: str) -> tuple[Tensor, Tensor]:
    _check_dequantize(tokens, canvas, bins)
    batch, joints = tokens.shape[:-1], tokens.shape[-1] // 3
    return (
        tokens.new_empty((*batch, joints, 2), dtype=torch.float32),
        tokens.new_empty((*batch, joints), dtype=torch.bool),
    )


_quantize_op = Op(
    "quantize_coords(Tensor xy, Tensor visible, Tensor? scale, Tensor? offset, float canvas, int bins, str backend)"
    " -> Tensor",
    _quantize,
    _quantize_fake,
)
_dequantize_op = Op(
    "dequantize_coords(Tensor tokens, float canvas, int bins, str backend) -> (Tensor, Tensor)",
    _dequantize,
    _dequantize_fake,
)
