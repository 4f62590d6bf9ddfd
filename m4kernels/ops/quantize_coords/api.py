"""Public functions quantize_coords and dequantize_coords, and their registration with torch.library."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4kernels import _checks
from m4kernels._library import Op
from m4kernels.dispatch import Dispatcher
from m4kernels.ops.quantize_coords.arguments import OP, DequantizeArguments, QuantizeArguments, QuantizeBackend

dispatcher: Dispatcher[QuantizeBackend] = Dispatcher(OP, ("cuda", "triton", "cpp", "reference"), QuantizeBackend)


def quantize_coords(
    xy: Tensor,  # (..., J, 2)
    visible: Tensor,  # (..., J)
    scale: "Tensor | np.ndarray | float | None" = None,  # broadcastable to (..., 2)
    offset: "Tensor | np.ndarray | float | None" = None,  # broadcastable to (..., 2)
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
        scale: floating, from source units to canvas units (pixels); default 1. Instead of a tensor also a NumPy array,
            a number or a list of them.
        offset: likewise, canvas units; default 0.
        canvas: side of the canvas, in canvas units; a positive number that float32 (float64 for float64 xy) holds.
        bins: number of quantisation bins an axis, 2 to 2**24.
        backend: "cuda", "triton", "cpp", "reference" or "auto", the fastest that can run; default what the variable
            M4KERNELS_BACKEND names, else auto. All agree bit for bit.

    Returns:
        int64 (..., 3 * J): all x tokens, then all y tokens, then visibility 0 or 1.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message names the argument.
    """
    if scale is not None and not isinstance(scale, Tensor):
        scale = _as_tensor("scale", scale, xy)
    if offset is not None and not isinstance(offset, Tensor):
        offset = _as_tensor("offset", offset, xy)
    if type(canvas) is not float:
        canvas = _checks.number("quantize_coords: canvas", canvas)
    if type(bins) is not int:
        bins = _checks.integer("quantize_coords: bins", bins)
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
        tokens: integer, all x, then all y, then visibility; uint64 as `tokens.to(torch.int64)` reads it.
        canvas: side of the canvas, in canvas units; a positive number that float32 holds.
        bins: number of quantisation bins an axis, 2 to 2**24.
        backend: "cuda", "triton", "cpp", "reference" or "auto", the fastest that can run; default what the variable
            M4KERNELS_BACKEND names, else auto. All agree bit for bit.

    Returns:
        (xy float32 (..., J, 2) in canvas units, visible bool (..., J)).

    Raises:
        ValueError: a shape, dtype or number does not fit; the message names the argument.
    """
    if type(canvas) is not float:
        canvas = _checks.number("dequantize_coords: canvas", canvas)
    if type(bins) is not int:
        bins = _checks.integer("dequantize_coords: bins", bins)
    return _dequantize_op(tokens, canvas, bins, backend or "")


def _as_tensor(name: str, value: Any, xy: Tensor) -> Tensor:
    """What stands for a tensor, on the device of xy; a copy, since an array may be read-only or in foreign order."""
    device = _checks.tensor("quantize_coords: xy", xy).device
    if torch.compiler.is_compiling():  # which traces NumPy, but not all of it
        tensor = torch.as_tensor(value, device=device)
        whole = not isinstance(value, np.ndarray) and not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        return tensor.double() if whole else tensor
    try:
        array = np.array(value, order="C")
        if array.dtype.kind in "iu" and not isinstance(value, np.ndarray):
            array = array.astype(np.float64)  # 2 is as good a number as 2.0
        return torch.tensor(array.astype(array.dtype.newbyteorder("="), copy=False), device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"quantize_coords: {name} must be a floating tensor, array or number, got {type(value).__name__}: {error}"
        ) from None


def _quantize(*args: Any) -> Tensor:
    call = QuantizeArguments(*args[:-1])
    call.check_structure()
    return dispatcher.select(args[-1], call).quantize_coords(call)


def _quantize_fake(*args: Any) -> Tensor:
    call = QuantizeArguments(*args[:-1])
    call.check_structure()
    *batch, joints, _ = call.xy.shape
    return call.xy.new_empty((*batch, 3 * joints), dtype=torch.int64)


def _dequantize(*args: Any) -> tuple[Tensor, Tensor]:
    call = DequantizeArguments(*args[:-1])
    call.check_structure()
    return dispatcher.select(args[-1], call).dequantize_coords(call)


def _dequantize_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = DequantizeArguments(*args[:-1])
    call.check_structure()
    tokens = call.tokens
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
