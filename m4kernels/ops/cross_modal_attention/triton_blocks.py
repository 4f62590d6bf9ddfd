"""What the Triton kernels of cross_modal_attention are made of: products, addresses and modalities.

Tokens of a sample are ordered by modality, so counts say which modalities a tile holds. They fit in the bits of an
integer, 31 at most: a query has the bits of the modalities it attends to, a key those of the modalities that attend to
it. What a program knows of modalities is a vector of one entry a lane of a warp: the hardware reduces it in one
instruction, to a number that the compiler knows to be the same in all lanes. So addresses and descriptors of tiles are
computed once a warp; the shuffles that fewer lanes would take hide that they are the same.
"""

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LANES = tl.constexpr(32)
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
def rows_on(p_x, i_row, stride):
    """Address i_row rows on, by a 64-bit offset."""
    return p_x + i_row.to(tl.int64) * stride


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
    x,  # (total, heads, HEAD_DIM), `pitch` heads from token to token
    cu_seqlens,  # (samples + 1,)
    total,
    samples,
    pitch,
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
        p_x = at(x, i_token, i_head, pitch * HEAD_DIM, HEAD_DIM)
        b_zero = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        store(p_x, pitch * HEAD_DIM, total - i_token, b_zero, HEAD_DIM, BLOCK, BLOCK_D)


@triton.jit
def spans(
    counts,  # (samples, MODALITIES)
    i_sample,
    MODALITIES: tl.constexpr,
):
    """First token of every modality in a sample, and the one after its last, both (LANES,)."""
    o_modality = tl.arange(0, LANES)
    p_count = counts + i_sample.to(tl.int64) * MODALITIES + o_modality
    b_count = tl.load(p_count, mask=o_modality < MODALITIES, other=0)
    b_end = tl.cumsum(b_count, 0)
    return b_end - b_count, b_end


@triton.jit
def allowed_by(
    allow,  # (MODALITIES, MODALITIES)
    stride,
    stride_bit,
    MODALITIES: tl.constexpr,
):
    """(LANES,): bit j of entry i is the number at i * stride + j * stride_bit of `allow`. With strides MODALITIES and 1
    entry i says what queries of modality i attend to, with 1 and MODALITIES what attends to its keys."""
    o_modality = tl.arange(0, LANES)
    b_bits = tl.zeros((LANES,), tl.int32)
    for j in tl.static_range(MODALITIES):
        b_allow = tl.load(allow + o_modality * stride + j * stride_bit, mask=o_modality < MODALITIES, other=0)
        b_bits |= b_allow.to(tl.int32) << j
    return b_bits


@triton.jit
def _entry(b_x, i):
    """Entry i of b_x (LANES,)."""
    return tl.sum(tl.where(tl.arange(0, LANES) == i, b_x, 0), 0)


@triton.jit
def of_tokens(b_value, b_start, b_end, i_first, MODALITIES: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,): the value of the modality of each token from i_first on, 0 beyond the sample's end."""
    o_token = i_first + tl.arange(0, BLOCK)
    b_token = tl.zeros((BLOCK,), tl.int32)
    for j in tl.static_range(MODALITIES):  # the last that begins at or before a token is its own: empty ones come first
        b_token = tl.where(o_token >= _entry(b_start, j), _entry(b_value, j), b_token)
    return tl.where(o_token < tl.max(b_end, 0), b_token, 0)


@triton.jit
def of_tile(b_bits, b_start, b_end, i_first, BLOCK: tl.constexpr):
    """The bits that some token of a tile has."""
    m_holds = (b_start < b_end) & (b_start < i_first + BLOCK) & (b_end > i_first)
    return tl.reduce(tl.where(m_holds, b_bits, 0), 0, _or)


@triton.jit
def tiles_of(b_start, b_end, bits, MODALITIES: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tiles lie that hold a token of the modalities in `bits`, for a loop that visits them and no others.

    Tiles lie side by side from the first such token on; those that hold none are left out. So the loop's steps, BLOCK
    apart from 0 on, fall behind the tokens at which their tiles begin, farther from one modality to the next.

    Returns:
        b_step, b_skip (LANES,): from step b_step[j] on, tiles are b_skip[j] or more tokens ahead of the steps. The step
        after the last. The token after the last that is wanted. Both are 0 where none is.
    """
    o_modality = tl.arange(0, LANES)
    m_wanted = (((bits >> o_modality) & 1) != 0) & (b_start < b_end)
    i_origin = tl.min(tl.where(m_wanted, b_start, 0x7FFFFFFF), 0)
    b_first = tl.where(m_wanted, (b_start - i_origin) // BLOCK, 0)
    b_after = tl.where(m_wanted, tl.cdiv(b_end - i_origin, BLOCK), 0)
    b_left_out, reached = tl.zeros((LANES,), tl.int32), 0
    for j in tl.static_range(MODALITIES):
        left_out = tl.maximum(_entry(b_first, j) - reached, 0)
        b_left_out += tl.where(o_modality >= j, left_out, 0)
        reached = tl.maximum(reached, _entry(b_after, j))
    b_skip = tl.where(m_wanted, i_origin + b_left_out * BLOCK, 0)
    steps = tl.max(tl.where(m_wanted, b_after - b_left_out, 0), 0) * BLOCK
    return (b_first - b_left_out) * BLOCK, b_skip, steps, tl.max(tl.where(m_wanted, b_end, 0), 0)


@triton.jit
def tile_at(b_step, b_skip, i_step):
    """The first token of a step's tile, by what `tiles_of` returns."""
    return i_step + tl.max(tl.where(b_step <= i_step, b_skip, 0), 0)


@triton.jit
def _below(b_x):
    """The bits below bit b_x, of 32."""
    return tl.where(b_x < 32, (1 << tl.minimum(tl.maximum(b_x, 0), 31)) - 1, -1)


@triton.jit
def _words(b_bits, b_start, b_end, i_first, MODALITIES: tl.constexpr):
    """(ROWS,): bit c says that token i_first + c is of a modality among a row's bits."""
    b_tokens = _below(b_end - i_first) & ~_below(b_start - i_first)
    b_word = tl.zeros_like(b_bits)
    for j in tl.static_range(MODALITIES):
        b_word |= tl.where((b_bits & (1 << j)) != 0, _entry(b_tokens, j), 0)
    return b_word


@triton.jit
def where_attended(
    b_x,  # (ROWS, BLOCK), float32
    LOWEST: tl.constexpr,
    b_bits,  # (ROWS,)
    b_start,  # (LANES,)
    b_end,  # (LANES,)
    i_first,
    MODALITIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """b_x where a column's token, the first being i_first, is of a modality among a row's bits, elsewhere 0, or with
    LOWEST -inf.

    A bit of a word a row decides, spread to a mask, because the compiler packs and unpacks 32 booleans of a thread. The
    first shift differs between lanes, the second, by multiples of 8, does not: fewer registers than with one.
    """
    tl.static_assert(BLOCK <= 64)
    o_column = tl.arange(0, BLOCK)[None, :]
    b_word = _words(b_bits, b_start, b_end, i_first, MODALITIES)[:, None]
    if BLOCK > 32:
        b_next = _words(b_bits, b_start, b_end, i_first + 32, MODALITIES)[:, None]
        b_word = tl.where(o_column < 32, b_word, b_next)
    b_keep = ((b_word << (7 - (o_column & 7))) << (24 - (o_column & 24))) >> 31
    b_kept = b_x.to(tl.int32, bitcast=True) & b_keep
    if LOWEST:
        b_kept |= -0x800000 & ~b_keep  # the bits of -inf
    return b_kept.to(tl.float32, bitcast=True)


@triton.jit
def load_lse(p_lse, m_row, IN_LOG2: tl.constexpr):
    """lse in the units of the scores, +inf in rows that have no keys or do not exist: exp(score - lse) is 0 there."""
    b_lse = tl.load(p_lse, mask=m_row, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse * LOG2_E if IN_LOG2 else b_lse


@triton.jit
def pack_rows(b_lse, b_delta):
    """lse and delta of rows as one integer each, so that one access reads both."""
    b_low = b_lse.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return b_low | (b_delta.to(tl.int32, bitcast=True).to(tl.int64) << 32)


@triton.jit
def unpack_rows(b_row):
    """The (lse, delta) that `pack_rows` packed."""
    return b_row.to(tl.int32).to(tl.float32, bitcast=True), (b_row >> 32).to(tl.int32).to(tl.float32, bitcast=True)
