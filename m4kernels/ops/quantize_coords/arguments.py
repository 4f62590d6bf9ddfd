"""The arguments of one call of quantize_coords and of dequantize_coords, checked; what every backend receives.

Named tuples, because a frozen dataclass takes a microsecond to make, of the 12 that a call takes; in the order of the
op's schema.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m4kernels import _checks
from m4kernels.backend import Backend

OP = "quantize_coords"
INVERSE_OP = "dequantize_coords"
MAX_BINS = 2**24  # the largest range of integers that float32 holds exactly
# (smallest, largest) canvas: what the arithmetic's dtype holds as a normal number.
SINGLE, DOUBLE = ((torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64))


class QuantizeArguments(NamedTuple):
    """One call of quantize_coords; shapes as in `api.quantize_coords`."""

    xy: Tensor  # (..., J, 2)
    visible: Tensor  # (..., J)
    scale: Tensor | None  # broadcastable to (..., 2)
    offset: Tensor | None  # broadcastable to (..., 2)
    canvas: float
    bins: int

    @property
    def device(self) -> torch.device:
        return self.xy.device

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes, devices or numbers do not fit; reads no values of tensors."""
        xy, visible, scale, offset, canvas, bins = self
        shape, device = xy.shape, xy.device
        _check_grid(OP, canvas, bins, DOUBLE if xy.dtype is torch.float64 else SINGLE)
        if not xy.is_floating_point():
            raise ValueError(f"{OP}: xy must be floating, got {xy.dtype}")
        if len(shape) < 2 or shape[-1] != 2:
            raise ValueError(f"{OP}: xy must have shape (..., J, 2), got {tuple(shape)}")
        if visible.dtype is not torch.bool:
            raise ValueError(f"{OP}: visible must be bool, got {visible.dtype}")
        if visible.shape != shape[:-1]:
            raise ValueError(f"{OP}: visible must have shape {tuple(shape[:-1])}, got {tuple(visible.shape)}")
        if visible.device != device:
            raise ValueError(f"{OP}: visible is on {visible.device}, xy on {device}")
        if scale is not None or offset is not None:
            pairs = (*shape[:-2], 2)
            for name, value in (("scale", scale), ("offset", offset)):
                if value is not None:
                    _check_pairs(name, value, pairs, device)


class DequantizeArguments(NamedTuple):
    """One call of dequantize_coords; shapes as in `api.dequantize_coords`."""

    tokens: Tensor  # (..., 3 * J)
    canvas: float
    bins: int

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes or numbers do not fit; reads no values of tensors."""
        tokens = self.tokens
        _check_grid(INVERSE_OP, self.canvas, self.bins, SINGLE)
        if not _checks.is_integer_dtype(tokens.dtype):
            raise ValueError(f"{INVERSE_OP}: tokens must be integer, got {tokens.dtype}")
        if tokens.dim() < 1 or tokens.shape[-1] % 3:
            raise ValueError(f"{INVERSE_OP}: tokens must have shape (..., 3 * J), got {tuple(tokens.shape)}")


class QuantizeBackend(Backend, Protocol):
    """What a backend of these two ops has; its `can_run` is asked about calls of either."""

    def quantize_coords(self, call: QuantizeArguments) -> Tensor:
        """int64 (..., 3 * J)"""

    def dequantize_coords(self, call: DequantizeArguments) -> tuple[Tensor, Tensor]:
        """xy float32 (..., J, 2), visible bool (..., J)"""


def _check_grid(op: str, canvas: float, bins: int, limits: tuple[float, float]) -> None:
    if not limits[0] <= canvas <= limits[1]:
        raise ValueError(
            f"{op}: canvas must be finite and positive, got {canvas}; "
            f"{'float32' if limits is SINGLE else 'float64'} holds {limits[0]:.2g} to {limits[1]:.2g}"
        )
    if not 2 <= bins <= MAX_BINS:
        raise ValueError(f"{op}: bins must be 2 to {MAX_BINS}, got {bins}")


def _check_pairs(name: str, value: Tensor, pairs: tuple[int, ...], device: torch.device) -> None:
    """Refuse a scale or offset that is not floating, not on the device or not broadcastable to `pairs`, (..., 2)."""
    if not value.is_floating_point():
        raise ValueError(f"{OP}: {name} must be floating, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{OP}: {name} is on {value.device}, xy on {device}")
    have = value.shape
    fits = have == pairs or (
        len(have) <= len(pairs)
        and all(size in (1, want) for size, want in zip(reversed(have), reversed(pairs), strict=False))
    )
    if not fits:
        raise ValueError(f"{OP}: {name} must be broadcastable to {pairs}, got {tuple(have)}")
