"""quantize_coords in Triton: one elementwise pass, a lane a joint.

A lane loads the joint's (x, y) and writes one token into each of the sample's three planes. Neighbouring lanes are
neighbouring joints, so every load, and every run of J tokens of a plane, is contiguous; the three planes of a sample
are written by the same warp at nearly the same time, so the sectors that two runs share meet again in the L2 cache. A
lane a token would store in whole lines, but computes everything twice: once for a coordinate, once for the visibility.

Bit-identity with the other backends: FMA contraction is off, divisions are IEEE, ties go to even by an addition.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from m4kernels._triton import launch_on
from m4kernels.aot import AotCase

# Joints of a program. One a lane, because with more Triton gives a lane four neighbours, so that its byte loads are
# wide: then the 8-byte accesses no longer coalesce, and the stores go through shared memory.
BLOCK = 256
MAX_JOINTS = 2**28  # offsets within a program are 32-bit
_OPTIONS = {"num_warps": BLOCK // 32, "enable_fp_fusion": False}


def can_run(x: Tensor, *args: object) -> str | None:
    """Up to 2**28 joints a sample; x is xy (..., J, 2) with four more tensors or None, or tokens (..., 3 J)."""
    joints = x.shape[-2] if x.is_floating_point() else x.shape[-1] // 3
    return None if joints <= MAX_JOINTS else f"it takes up to 2**28 joints a sample, got {joints}"


@triton.jit
def _joints(i_block, total, JOINTS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the joints of a program: (the first one, their offsets from it, mask, the first one's sample, the others'
    samples counted from there, their joints). Only the first one's place needs 64 bits and a slow division."""
    i_first = i_block.to(tl.int64) * BLOCK
    o_joint = tl.arange(0, BLOCK)
    m_joint = o_joint < tl.minimum(total - i_first, BLOCK).to(tl.int32)
    i_sample = i_first // JOINTS
    o_place = ((i_first - i_sample * JOINTS).to(tl.int32) + o_joint).to(tl.uint32)
    o_sample = o_place // JOINTS
    return i_first, o_joint, m_joint, i_sample, o_sample.to(tl.int32), (o_place - o_sample * JOINTS).to(tl.int32)


@triton.jit
def _affine(c, scale, offset, i_sample, o_sample, m_joint, scale_n, offset_n):
    """c * scale + offset, where these are not None, in c's dtype and rounded twice."""
    if scale is not None:
        p_scale = scale + i_sample * scale_n + o_sample.to(tl.int64) * scale_n
        c = c * tl.load(p_scale, mask=m_joint, other=0.0).to(c.dtype)
    if offset is not None:
        p_offset = offset + i_sample * offset_n + o_sample.to(tl.int64) * offset_n
        c = c + tl.load(p_offset, mask=m_joint, other=0.0).to(c.dtype)
    return c


@triton.jit
def _token(c, CANVAS: tl.constexpr, INVERSE: tl.constexpr, LAST_BIN: tl.constexpr):
    """(int64 tokens, whether inside the canvas) of canvas coordinates: csrc/quantize_coords/quantize_coords.h."""
    canvas = tl.full((), CANVAS, c.dtype)
    if INVERSE != 0.0:
        t = c * INVERSE
    elif c.dtype == tl.float64:
        t = c / canvas
    else:
        t = tl.div_rn(c, canvas)  # `/` is approximate for float32
    t = t * LAST_BIN
    t = tl.where(t > 0.0, t, 0.0)  # also takes NaN, for which the comparison is false
    t = tl.where(t < LAST_BIN, t, LAST_BIN)
    t = tl.where(tl.abs(c) < float("inf"), t, 0.0)  # NaN too
    # Nearest, ties to even, as adding 2^(mantissa bits) makes the addition itself round; from there on t is an integer.
    shift = tl.full((), 4503599627370496.0 if c.dtype == tl.float64 else 8388608.0, c.dtype)
    t = tl.where(t < shift, (t + shift) - shift, t)
    return t.to(tl.int32).to(tl.int64), (c >= 0.0) & (c <= canvas)


@triton.jit
def _quantize_kernel(
    xy,  # (n, J, 2) contiguous
    visible,  # (n, J) contiguous
    scale,  # (n, 2), strides (scale_n, scale_c), or None
    offset,  # (n, 2), strides (offset_n, offset_c), or None
    tokens,  # (n, 3, J) contiguous
    total,  # n * J
    scale_n,
    scale_c,
    offset_n,
    offset_c,
    JOINTS: tl.constexpr,
    CANVAS: tl.constexpr,
    INVERSE: tl.constexpr,  # 1 / CANVAS where that is exact, else 0
    LAST_BIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_first, o_joint, m_joint, i_sample, o_sample, j = _joints(tl.program_id(0), total, JOINTS, BLOCK)
    p_xy = xy + 2 * i_first + 2 * o_joint
    x, y = tl.split(tl.load(p_xy[:, None] + tl.arange(0, 2)[None, :], mask=m_joint[:, None], other=0.0))
    seen = tl.load(visible + i_first + o_joint, mask=m_joint, other=0) != 0
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    x = _affine(x, scale, offset, i_sample, o_sample, m_joint, scale_n, offset_n)
    p_scale_y = scale + scale_c if scale is not None else None
    p_offset_y = offset + offset_c if offset is not None else None
    y = _affine(y, p_scale_y, p_offset_y, i_sample, o_sample, m_joint, scale_n, offset_n)
    x_token, x_inside = _token(x, CANVAS, INVERSE, LAST_BIN)
    y_token, y_inside = _token(y, CANVAS, INVERSE, LAST_BIN)
    p_tokens = tokens + i_sample * (3 * JOINTS) + (o_sample * (3 * JOINTS) + j)
    tl.store(p_tokens, x_token, mask=m_joint)
    tl.store(p_tokens + JOINTS, y_token, mask=m_joint)
    tl.store(p_tokens + 2 * JOINTS, (seen & x_inside & y_inside).to(tl.int64), mask=m_joint)


@triton.jit
def _dequantize_kernel(
    tokens,  # (n, 3, J) contiguous
    xy,  # (n, J, 2)
    visible,  # (n, J)
    total,  # n * J
    JOINTS: tl.constexpr,
    CANVAS: tl.constexpr,
    LAST_BIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_first, o_joint, m_joint, i_sample, o_sample, j = _joints(tl.program_id(0), total, JOINTS, BLOCK)
    p_tokens = tokens + i_sample * (3 * JOINTS) + (o_sample * (3 * JOINTS) + j)
    x = tl.load(p_tokens, mask=m_joint, other=0).to(tl.float32)
    y = tl.load(p_tokens + JOINTS, mask=m_joint, other=0).to(tl.float32)
    seen = tl.load(p_tokens + 2 * JOINTS, mask=m_joint, other=0) != 0
    both = tl.div_rn(tl.join(x, y), tl.full((), LAST_BIN, tl.float32)) * tl.full((), CANVAS, tl.float32)
    p_xy = xy + 2 * i_first + 2 * o_joint
    tl.store(p_xy[:, None] + tl.arange(0, 2)[None, :], both, mask=m_joint[:, None])
    tl.store(visible + i_first + o_joint, seen, mask=m_joint)


def quantize_coords(
    xy: Tensor, visible: Tensor, scale: Tensor | None, offset: Tensor | None, canvas: float, bins: int
) -> Tensor:
    """xy (..., J, 2), visible (..., J), scale and offset broadcastable to (..., 2) → int64 (..., 3 J)."""
    batch, joints = xy.shape[:-2], xy.shape[-2]
    tokens = torch.empty((*batch, 3 * joints), dtype=torch.int64, device=xy.device)
    total = batch.numel() * joints
    if total == 0:
        return tokens
    scale, *scale_strides = _per_sample(scale, batch)
    offset, *offset_strides = _per_sample(offset, batch)
    with launch_on(xy):
        _quantize_kernel[(triton.cdiv(total, BLOCK),)](
            *(
                _loadable(xy).contiguous(),
                visible.contiguous(),
                scale,
                offset,
                tokens,
                total,
                *scale_strides,
                *offset_strides,
            ),
            **_grid_of_bins(joints, canvas, bins),
            INVERSE=_exact_inverse(canvas),
            **_OPTIONS,
        )
    return tokens


def dequantize_coords(tokens: Tensor, canvas: float, bins: int) -> tuple[Tensor, Tensor]:
    """tokens (..., 3 J) → xy float32 (..., J, 2), visible bool (..., J)."""
    batch, joints = tokens.shape[:-1], tokens.shape[-1] // 3
    xy = torch.empty((*batch, joints, 2), dtype=torch.float32, device=tokens.device)
    visible = torch.empty((*batch, joints), dtype=torch.bool, device=tokens.device)
    total = visible.numel()
    if total:
        with launch_on(tokens):
            _dequantize_kernel[(triton.cdiv(total, BLOCK),)](
                *(tokens.contiguous(), xy, visible, total), **_grid_of_bins(joints, canvas, bins), **_OPTIONS
            )
    return xy, visible


def _grid_of_bins(joints: int, canvas: float, bins: int) -> dict[str, float]:
    # Constants of the compiled kernel: a data set has one grid, and floating arguments would be rounded to float32.
    return {"JOINTS": joints, "CANVAS": canvas, "LAST_BIN": float(bins - 1), "BLOCK": BLOCK}


def _exact_inverse(canvas: float) -> float:
    """1 / canvas where multiplying by it gives the same bits as dividing, for powers of two such as 256; else 0."""
    mantissa, exponent = math.frexp(canvas)
    return 1 / canvas if mantissa == 0.5 and abs(exponent) < 100 else 0.0


def _loadable(x: Tensor) -> Tensor:
    """x as it is where the kernel converts it, else (the 8-bit floats) in float32."""
    return x if x.dtype.itemsize > 1 else x.to(torch.float32)


def _per_sample(value: Tensor | None, batch: torch.Size) -> tuple[Tensor | None, int, int]:
    """(values (n, 2), their strides), a view where the broadcast dimensions allow it."""
    if value is None:
        return None, 0, 0
    value = _loadable(value).expand(*batch, 2).reshape(batch.numel(), 2)
    return value, value.stride(0), value.stride(1)


def aot_cases() -> Sequence[AotCase]:
    """The launches at M4's grid (13 joints; the canvas of 256, and one that needs the division)."""
    cases = []
    for xy_type, joints, canvas in (("fp32", 13, 256.0), ("fp32", 13, 100.0), ("fp64", 17, 100.0), ("bf16", 13, 256.0)):
        shared = xy_type == "bf16"  # scale and offset shared by all samples; else one pair a sample
        strides = {name: 0 if shared and name.endswith("_n") else None for name in ("scale_n", "offset_n")}
        ones = {"scale_c": 1, "offset_c": 1} | {name: n for name, n in strides.items() if n is not None}
        cases.append(
            AotCase(
                f"quantize {xy_type} joints {joints} canvas {canvas:g}" + (" shared scale" if shared else ""),
                _quantize_kernel,
                {"xy": f"*{xy_type}:16", "visible": "*i1:16", "scale": f"*{xy_type}:16", "offset": f"*{xy_type}:16"}
                | {"tokens": "*i64:16", "total": "i32"}
                | {name: "i32" for name in strides if name not in ones},
                ones | _grid_of_bins(joints, canvas, 8192) | {"INVERSE": _exact_inverse(canvas)},
                num_warps=BLOCK // 32,
                options={"enable_fp_fusion": False},
                max_registers=40,
            )
        )
    for kind in ("i64", "u16"):
        cases.append(
            AotCase(
                f"dequantize {kind}",
                _dequantize_kernel,
                {"tokens": f"*{kind}:16", "xy": "*fp32:16", "visible": "*i1:16", "total": "i32"},
                _grid_of_bins(13, 256.0, 8192),
                num_warps=BLOCK // 32,
                options={"enable_fp_fusion": False},
                max_registers=40,
            )
        )
    return cases
