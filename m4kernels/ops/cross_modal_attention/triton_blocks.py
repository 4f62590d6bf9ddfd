"""What the Triton kernels of cross_modal_attention are made of: products, addresses and modalities.

Tokens of a sample are ordered by modality, so counts say which modalities a tile holds. They fit in the bits of an
integer, 31 at most: a query has the bits of the modalities it attends to, a key the bit of its own. Two integers a tile
then decide whether a pair of tiles is skipped, whole, or mixed; only mixed tiles look at single scores.
"""

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The interpreter cannot multiply bfloat16 blocks, so there, and only there, they are multiplied in float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(b_x, b_y):
    """Product of two blocks, added up in float32; of float32 blocks without rounding them to TF32."""
    if INTERPRETED:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, input_precision="ieee")


@triton.jit
def _or(x, y):
    return x | y


@triton.jit
def exp(b_x, IN_LOG2: tl.constexpr):
    """e to the b_x, or 2 to the b_x where that is in units of log 2."""
    if IN_LOG2:
        b_exp = tl.exp2(b_x)
    else:
        b_exp = tl.exp(b_x)
    return b_exp


@triton.jit
def place(heads, tiles):
    """(head, tile, sample) of this program: those that run together read the heads of the same tokens, side by side in
    memory."""
    i_program = tl.program_id(0)
    i_rest = i_program // heads
    return i_program % heads, i_rest % tiles, i_rest // tiles


@triton.jit
def at(
    x,  # (tokens, heads, head_dim)
    i_token,
    i_head,
    stride_token,
    stride_head,
):
    """Address of one token's head, by 64-bit offsets."""
    return x + i_token.to(tl.int64) * stride_token + i_head.to(tl.int64) * stride_head


@triton.jit
def _mask(rows, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D), or (BLOCK, 1) where the head fills its block: the first `rows` rows of HEAD_DIM numbers."""
    m_x = (tl.arange(0, BLOCK) < rows)[:, None]
    if HEAD_DIM != BLOCK_D:
        m_x = m_x & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return m_x


@triton.jit
def load(p_x, stride, rows, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) from p_x on, 0 beyond the first `rows` rows and beyond HEAD_DIM."""
    o_x = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(p_x + o_x, mask=_mask(rows, HEAD_DIM, BLOCK, BLOCK_D), other=0.0)


@triton.jit
def store(p_x, stride, rows, b_x, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the first `rows` rows of b_x, rounded to the type of the memory."""
    o_x = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=_mask(rows, HEAD_DIM, BLOCK, BLOCK_D))


@triton.jit
def zero_tail(
    x,  # (total, heads, HEAD_DIM), contiguous
    cu_seqlens,  # (samples + 1,)
    total,
    samples,
    heads,
    i_head,
    i_tile,
    tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write 0 to the head of every token that belongs to no sample; `tiles` programs share them out."""
    i_first = tl.load(cu_seqlens + samples)
    for i_block in range(i_tile, tl.cdiv(total - i_first, BLOCK), tiles):
        i_token = i_first + i_block * BLOCK
        p_x = at(x, i_token, i_head, heads * HEAD_DIM, HEAD_DIM)
        b_zero = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        store(p_x, heads * HEAD_DIM, total - i_token, b_zero, HEAD_DIM, BLOCK, BLOCK_D)


@triton.jit
def spans(
    counts,  # (samples, MODALITIES)
    i_sample,
    MODALITIES: tl.constexpr,
    BLOCK_MODALITIES: tl.constexpr,
):
    """First token of every modality in a sample, and the one after its last, both (BLOCK_MODALITIES,)."""
    o_modality = tl.arange(0, BLOCK_MODALITIES)
    p_count = counts + i_sample.to(tl.int64) * MODALITIES + o_modality
    b_count = tl.load(p_count, mask=o_modality < MODALITIES, other=0)
    b_end = tl.cumsum(b_count, 0)
    return b_end - b_count, b_end


@triton.jit
def allowed_by(
    allow,  # (MODALITIES, MODALITIES)
    MODALITIES: tl.constexpr,
    BLOCK_MODALITIES: tl.constexpr,
):
    """(BLOCK_MODALITIES,): bit j of entry i says allow[i, j]."""
    o_modality = tl.arange(0, BLOCK_MODALITIES)
    m_modality = o_modality < MODALITIES
    o_allow = o_modality[:, None] * MODALITIES + o_modality[None, :]
    b_allow = tl.load(allow + o_allow, mask=m_modality[:, None] & m_modality[None, :], other=0)
    return tl.sum(b_allow.to(tl.int32) << o_modality[None, :], 1)


@triton.jit
def of_tokens(b_value, b_start, b_end, i_first, BLOCK: tl.constexpr):
    """(BLOCK,): the value of the modality of each token from i_first on, 0 beyond the sample's end."""
    o_token = i_first + tl.arange(0, BLOCK)[:, None]
    return tl.sum(tl.where((o_token >= b_start[None, :]) & (o_token < b_end[None, :]), b_value[None, :], 0), 1)


@triton.jit
def _holds(b_start, b_end, i_first, BLOCK: tl.constexpr):
    """(BLOCK_MODALITIES,) bool: which modalities a tile holds."""
    return (b_start < b_end) & (b_start < i_first + BLOCK) & (b_end > i_first)


@triton.jit
def queries_of(b_start, b_end, b_allowed, i_first, BLOCK: tl.constexpr):
    """Of a tile of queries, in bits: the modalities that some of them attend to, those that some do not attend to."""
    m_holds = _holds(b_start, b_end, i_first, BLOCK)
    some = tl.reduce(tl.where(m_holds, b_allowed, 0), 0, _or)
    return some, tl.reduce(tl.where(m_holds, ~b_allowed, 0), 0, _or)


@triton.jit
def keys_of(b_start, b_end, i_first, BLOCK_MODALITIES: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile of keys, in bits: the modalities it holds."""
    b_bit = 1 << tl.arange(0, BLOCK_MODALITIES)
    return tl.sum(tl.where(_holds(b_start, b_end, i_first, BLOCK), b_bit, 0), 0)


@triton.jit
def labels_of_keys(b_start, b_end, i_first, BLOCK_MODALITIES: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,): the bit of each key's modality."""
    return of_tokens(1 << tl.arange(0, BLOCK_MODALITIES), b_start, b_end, i_first, BLOCK)


@triton.jit
def load_lse(p_lse, m_row, IN_LOG2: tl.constexpr):
    """lse in the units of the scores, +inf in rows that have no keys or do not exist: exp(score - lse) is 0 there."""
    b_lse = tl.load(p_lse, mask=m_row, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse * LOG2_E if IN_LOG2 else b_lse
