"""quantize_coords in Triton: one elementwise pass, a lane a joint.

A lane loads the joint's (x, y) and writes one token into each of the sample's three planes. Neighbouring lanes are
neighbouring joints, so every load, and every run of J tokens of a plane, is contiguous; the three planes of a sample
are written by the same warp at nearly the same time, so the sectors that two runs share meet again in the L2 cache. A
lane a token would store in whole lines, but computes everything twice: once for a coordinate, once for the visibility.

Bit-identity with the other backends: FMA contraction is off, divisions are IEEE, ties go to even by an addition.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from m4kernels._triton import launch_on
from m4kernels.ops.quantize_coords.arguments import DequantizeArguments, QuantizeArguments

# Joints of a program. One a lane, because with more Triton gives a lane four neighbours, so that its byte loads are
# wide: then the 8-byte accesses no longer coalesce, and the stores go through shared memory.
BLOCK = 256
MAX_JOINTS = 2**28  # offsets within a program are 32-bit
OPTIONS = {"num_warps": BLOCK // 32, "enable_fp_fusion": False}


def can_run(call: QuantizeArguments | DequantizeArguments) -> str | None:
    """Up to 2**28 joints a sample."""
    joints = call.xy.shape[-2] if isinstance(call, QuantizeArguments) else call.tokens.shape[-1] // 3
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
def _affine(b_c, scale, offset, i_sample, o_sample, m_joint, scale_n, offset_n):
    """b_c * scale + offset, where these are not None, in the dtype of b_c and rounded twice."""
    if scale is not None:
        p_scale = scale + i_sample * scale_n + o_sample.to(tl.int64) * scale_n
        b_c = b_c * tl.load(p_scale, mask=m_joint, other=0.0).to(b_c.dtype)
    if offset is not None:
        p_offset = offset + i_sample * offset_n + o_sample.to(tl.int64) * offset_n
        b_c = b_c + tl.load(p_offset, mask=m_joint, other=0.0).to(b_c.dtype)
    return b_c


@triton.jit
def _token(b_c, CANVAS: tl.constexpr, INVERSE: tl.constexpr, LAST_BIN: tl.constexpr):
    """(int64 tokens, whether inside the canvas) of canvas coordinates: csrc/quantize_coords/quantize_coords.h."""
    b_canvas = tl.full((), CANVAS, b_c.dtype)
    if INVERSE != 0.0:
        b_token = b_c * INVERSE
    elif b_c.dtype == tl.float64:
        b_token = b_c / b_canvas
    else:
        b_token = tl.div_rn(b_c, b_canvas)  # `/` is approximate for float32
    b_token = b_token * LAST_BIN
    b_token = tl.where(b_token > 0.0, b_token, 0.0)  # also takes NaN, for which the comparison is false
    b_token = tl.where(b_token < LAST_BIN, b_token, LAST_BIN)
    b_token = tl.where(tl.abs(b_c) < float("inf"), b_token, 0.0)  # NaN too
    # Nearest, ties to even, as adding 2^(mantissa bits) makes the addition itself round; from there on all are whole.
    b_shift = tl.full((), 4503599627370496.0 if b_c.dtype == tl.float64 else 8388608.0, b_c.dtype)
    b_token = tl.where(b_token < b_shift, (b_token + b_shift) - b_shift, b_token)
    return b_token.to(tl.int32).to(tl.int64), (b_c >= 0.0) & (b_c <= b_canvas)


@triton.jit
def quantize_kernel(
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
    i_first, o_joint, m_joint, i_sample, o_sample, i_joint = _joints(tl.program_id(0), total, JOINTS, BLOCK)
    p_xy = xy + 2 * i_first + 2 * o_joint
    b_x, b_y = tl.split(tl.load(p_xy[:, None] + tl.arange(0, 2)[None, :], mask=m_joint[:, None], other=0.0))
    m_seen = tl.load(visible + i_first + o_joint, mask=m_joint, other=0) != 0
    if b_x.dtype != tl.float64:
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    b_x = _affine(b_x, scale, offset, i_sample, o_sample, m_joint, scale_n, offset_n)
    p_scale_y = scale + scale_c if scale is not None else None
    p_offset_y = offset + offset_c if offset is not None else None
    b_y = _affine(b_y, p_scale_y, p_offset_y, i_sample, o_sample, m_joint, scale_n, offset_n)
    b_x_token, m_x_inside = _token(b_x, CANVAS, INVERSE, LAST_BIN)
    b_y_token, m_y_inside = _token(b_y, CANVAS, INVERSE, LAST_BIN)
    p_tokens = tokens + i_sample * (3 * JOINTS) + (o_sample * (3 * JOINTS) + i_joint)
    tl.store(p_tokens, b_x_token, mask=m_joint)
    tl.store(p_tokens + JOINTS, b_y_token, mask=m_joint)
    tl.store(p_tokens + 2 * JOINTS, (m_seen & m_x_inside & m_y_inside).to(tl.int64), mask=m_joint)


@triton.jit
def dequantize_kernel(
    tokens,  # (n, 3, J) contiguous
    xy,  # (n, J, 2)
    visible,  # (n, J)
    total,  # n * J
    JOINTS: tl.constexpr,
    CANVAS: tl.constexpr,
    LAST_BIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_first, o_joint, m_joint, i_sample, o_sample, i_joint = _joints(tl.program_id(0), total, JOINTS, BLOCK)
    p_tokens = tokens + i_sample * (3 * JOINTS) + (o_sample * (3 * JOINTS) + i_joint)
    b_x = tl.load(p_tokens, mask=m_joint, other=0).to(tl.float32)
    b_y = tl.load(p_tokens + JOINTS, mask=m_joint, other=0).to(tl.float32)
    m_seen = tl.load(p_tokens + 2 * JOINTS, mask=m_joint, other=0) != 0
    b_both = tl.div_rn(tl.join(b_x, b_y), tl.full((), LAST_BIN, tl.float32)) * tl.full((), CANVAS, tl.float32)
    p_xy = xy + 2 * i_first + 2 * o_joint
    tl.store(p_xy[:, None] + tl.arange(0, 2)[None, :], b_both, mask=m_joint[:, None])
    tl.store(visible + i_first + o_joint, m_seen, mask=m_joint)


def quantize_coords(call: QuantizeArguments) -> Tensor:
    """int64 (..., 3 J)"""
    xy, visible, scale, offset, canvas, bins = call
    batch, joints = xy.shape[:-2], xy.shape[-2]
    tokens = torch.empty((*batch, 3 * joints), dtype=torch.int64, device=xy.device)
    total = batch.numel() * joints
    if total == 0:
        return tokens
    scale, scale_n, scale_c = _per_sample(scale, batch)
    offset, offset_n, offset_c = _per_sample(offset, batch)
    with launch_on(xy):
        quantize_kernel[(triton.cdiv(total, BLOCK),)](
            xy=_loadable(xy).contiguous(),
            visible=visible.contiguous(),
            scale=scale,
            offset=offset,
            tokens=tokens,
            total=total,
            scale_n=scale_n,
            scale_c=scale_c,
            offset_n=offset_n,
            offset_c=offset_c,
            **grid_of_bins(joints, canvas, bins),
            INVERSE=exact_inverse(canvas),
            **OPTIONS,
        )
    return tokens


def dequantize_coords(call: DequantizeArguments) -> tuple[Tensor, Tensor]:
    """xy float32 (..., J, 2), visible bool (..., J)"""
    tokens, canvas, bins = call
    batch, joints = tokens.shape[:-1], tokens.shape[-1] // 3
    xy = torch.empty((*batch, joints, 2), dtype=torch.float32, device=tokens.device)
    visible = torch.empty((*batch, joints), dtype=torch.bool, device=tokens.device)
    total = visible.numel()
    if total:
        with launch_on(tokens):
            dequantize_kernel[(triton.cdiv(total, BLOCK),)](
                tokens=_signed(tokens).contiguous(),
                xy=xy,
                visible=visible,
                total=total,
                **grid_of_bins(joints, canvas, bins),
                **OPTIONS,
            )
    return xy, visible


def grid_of_bins(joints: int, canvas: float, bins: int) -> dict[str, float]:
    # Constants of the compiled kernel: a data set has one grid, and floating arguments would be rounded to float32.
    return {"JOINTS": joints, "CANVAS": canvas, "LAST_BIN": float(bins - 1), "BLOCK": BLOCK}


def exact_inverse(canvas: float) -> float:
    """1 / canvas where multiplying by it gives the same bits as dividing, for powers of two such as 256; else 0."""
    mantissa, exponent = math.frexp(canvas)
    return 1 / canvas if mantissa == 0.5 and abs(exponent) < 100 else 0.0


def _loadable(x: Tensor) -> Tensor:
    """x as it is where the kernel converts it, else (the 8-bit floats) in float32."""
    return x if x.dtype.itemsize > 1 else x.to(torch.float32)


def _signed(tokens: Tensor) -> Tensor:
    """uint64 as int64, which the other backends convert it to."""
    return tokens.to(torch.int64) if tokens.dtype == torch.uint64 else tokens


def _per_sample(value: Tensor | None, batch: torch.Size) -> tuple[Tensor | None, int, int]:
    """(values (n, 2), their strides), a view where the broadcast dimensions allow it."""
    if value is None:
        return None, 0, 0
    value = _loadable(value).expand(*batch, 2).reshape(batch.numel(), 2)
    return value, value.stride(0), value.stride(1)
