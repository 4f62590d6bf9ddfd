"""Triton kernels of cross_modal_attention: forward, gradient of the queries, gradients of keys and values.

A program owns one tile of one sample and head and loops over the tiles of the other side, so no two programs add to the
same number: no atomics, the same bits on every run. The grid depends on shapes and `max_seqlen` only; programs beyond a
sample's end leave at once, and those of the sample after the last write the tail. Offsets are 64-bit up to the tile
and 32-bit within. In bfloat16 and float16 scores are in units of log 2, since the hardware has exp2; in float32 the
roundings that this adds to every lse would be the largest error.

Modalities: tokens of a sample are ordered by modality, so counts say which modalities a tile holds. Up to 31 of them
fit in the bits of an integer: a query has the bits of the modalities it attends to, a key the bit of its own. Two
integers a tile then decide whether a pair of tiles is skipped, whole, or mixed; only mixed tiles look at single scores.
With more modalities nothing is skipped, and every score looks its pair up.

Without TF32 the products of float32 blocks run on the ordinary cores, with their operands in registers; blocks of
queries that the whole loop needs would stay there throughout, and spill: they are loaded anew, from the cache, at each
step.
"""

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PACKED_MODALITIES = tl.constexpr(31)
# The interpreter cannot multiply bfloat16 blocks, so there, and only there, they are multiplied in float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(b_x, b_y):
    """Product of two blocks, added up in float32; of float32 blocks without rounding them to TF32."""
    if INTERPRETED:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, input_precision="ieee")


@triton.jit
def _or(x, y):
    return x | y


@triton.jit
def _exp(b_x, IN_LOG2: tl.constexpr):
    if IN_LOG2:
        b_exp = tl.exp2(b_x)
    else:
        b_exp = tl.exp(b_x)
    return b_exp


@triton.jit
def _place(heads, tiles):
    """(head, tile, sample) of this program: those that run together read the heads of the same tokens, side by side in
    memory."""
    i_program = tl.program_id(0)
    i_rest = i_program // heads
    return i_program % heads, i_rest % tiles, i_rest // tiles


@triton.jit
def _at(x, i_token, i_head, stride_token, stride_head):
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
def _load(p_x, stride, rows, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) from p_x on, 0 beyond the first `rows` rows and beyond HEAD_DIM."""
    o_x = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(p_x + o_x, mask=_mask(rows, HEAD_DIM, BLOCK, BLOCK_D), other=0.0)


@triton.jit
def _store(p_x, stride, rows, b_x, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the first `rows` rows of b_x, rounded to the type of the memory."""
    o_x = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=_mask(rows, HEAD_DIM, BLOCK, BLOCK_D))


@triton.jit
def _zero_tail(
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
        p_x = _at(x, i_token, i_head, heads * HEAD_DIM, HEAD_DIM)
        b_zero = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        _store(p_x, heads * HEAD_DIM, total - i_token, b_zero, HEAD_DIM, BLOCK, BLOCK_D)


@triton.jit
def _spans(counts, i_sample, MODALITIES: tl.constexpr, BLOCK_MODALITIES: tl.constexpr):
    """First token of every modality in a sample, and the one after its last, both (BLOCK_MODALITIES,)."""
    o_modality = tl.arange(0, BLOCK_MODALITIES)
    p_count = counts + i_sample.to(tl.int64) * MODALITIES + o_modality
    b_count = tl.load(p_count, mask=o_modality < MODALITIES, other=0)
    b_end = tl.cumsum(b_count, 0)
    return b_end - b_count, b_end


@triton.jit
def _allowed_by(allow, MODALITIES: tl.constexpr, BLOCK_MODALITIES: tl.constexpr):
    """(BLOCK_MODALITIES,): bit j of entry i says allow[i, j]; with too many for that, where row i begins."""
    o_modality = tl.arange(0, BLOCK_MODALITIES)
    if MODALITIES > PACKED_MODALITIES:
        b_allowed = o_modality * MODALITIES
    else:
        m_modality = o_modality < MODALITIES
        o_allow = o_modality[:, None] * MODALITIES + o_modality[None, :]
        b_allow = tl.load(allow + o_allow, mask=m_modality[:, None] & m_modality[None, :], other=0)
        b_allowed = tl.sum(b_allow.to(tl.int32) << o_modality[None, :], 1)
    return b_allowed


@triton.jit
def _of_tokens(b_value, b_start, b_end, i_first, BLOCK: tl.constexpr):
    """(BLOCK,): the value of the modality of each token from i_first on, 0 beyond the sample's end."""
    o_token = i_first + tl.arange(0, BLOCK)[:, None]
    return tl.sum(tl.where((o_token >= b_start[None, :]) & (o_token < b_end[None, :]), b_value[None, :], 0), 1)


@triton.jit
def _holds(b_start, b_end, i_first, BLOCK: tl.constexpr):
    """(BLOCK_MODALITIES,) bool: which modalities a tile holds."""
    return (b_start < b_end) & (b_start < i_first + BLOCK) & (b_end > i_first)


@triton.jit
def _queries_of(b_start, b_end, b_allowed, i_first, MODALITIES: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile of queries, in bits: the modalities that some of them attend to, those that some do not attend to."""
    if MODALITIES > PACKED_MODALITIES:
        some, lacking = 1, 1
    else:
        m_holds = _holds(b_start, b_end, i_first, BLOCK)
        some = tl.reduce(tl.where(m_holds, b_allowed, 0), 0, _or)
        lacking = tl.reduce(tl.where(m_holds, ~b_allowed, 0), 0, _or)
    return some, lacking


@triton.jit
def _keys_of(b_start, b_end, i_first, MODALITIES: tl.constexpr, BLOCK_MODALITIES: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile of keys, in bits: the modalities it holds."""
    if MODALITIES > PACKED_MODALITIES:
        held = 1
    else:
        b_bit = 1 << tl.arange(0, BLOCK_MODALITIES)
        held = tl.sum(tl.where(_holds(b_start, b_end, i_first, BLOCK), b_bit, 0), 0)
    return held


@triton.jit
def _labels_of_keys(
    b_start, b_end, i_first, MODALITIES: tl.constexpr, BLOCK_MODALITIES: tl.constexpr, BLOCK: tl.constexpr
):
    """(BLOCK,): the bit of each key's modality; with too many for that, its number."""
    o_modality = tl.arange(0, BLOCK_MODALITIES)
    if MODALITIES <= PACKED_MODALITIES:
        o_modality = 1 << o_modality
    return _of_tokens(o_modality, b_start, b_end, i_first, BLOCK)


@triton.jit
def _attends(allow, b_query, b_key, MODALITIES: tl.constexpr):
    """Whether queries attend to keys, from `_of_tokens` of what `_allowed_by` gives and `_labels_of_keys`."""
    if MODALITIES > PACKED_MODALITIES:
        m_score = tl.load(allow + b_query + b_key) != 0
    else:
        m_score = (b_query & b_key) != 0
    return m_score


@triton.jit
def _lse(p_lse, m_row, IN_LOG2: tl.constexpr):
    """lse in the units of the scores, +inf in rows that have no keys or do not exist: exp(score - lse) is 0 there."""
    b_lse = tl.load(p_lse, mask=m_row, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse * LOG2_E if IN_LOG2 else b_lse


@triton.jit
def forward_kernel(
    q,  # (total, heads, HEAD_DIM)
    k,  # (Tk, heads / GROUP, HEAD_DIM)
    v,  # (Tk, heads / GROUP, HEAD_DIM)
    out,  # (total, heads, HEAD_DIM), contiguous
    lse,  # (heads, total)
    q_cu_seqlens,  # (samples + 1,)
    k_cu_seqlens,  # (samples + 1,)
    q_counts,  # (samples, MODALITIES)
    k_counts,  # (samples, MODALITIES)
    allow,  # (MODALITIES, MODALITIES) or None
    scale,
    total,
    samples,
    heads,
    tiles,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    GROUP: tl.constexpr,
    MODALITIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_MODALITIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_head, i_tile, i_sample = _place(heads, tiles)
    if i_sample == samples:
        _zero_tail(out, q_cu_seqlens, total, samples, heads, i_head, i_tile, tiles, HEAD_DIM, BLOCK_Q, BLOCK_D)
        i_first = tl.load(q_cu_seqlens + samples)
        for i_block in range(i_tile, tl.cdiv(total - i_first, BLOCK_Q), tiles):
            o_token = i_first + i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            p_lse = lse + i_head.to(tl.int64) * total + o_token
            tl.store(p_lse, tl.full((BLOCK_Q,), float("-inf"), tl.float32), mask=o_token < total)
        return
    i_start, i_query = tl.load(q_cu_seqlens + i_sample), i_tile * BLOCK_Q
    rows = tl.load(q_cu_seqlens + i_sample + 1) - i_start - i_query
    if rows <= 0:
        return
    i_key_start = tl.load(k_cu_seqlens + i_sample)
    keys = tl.load(k_cu_seqlens + i_sample + 1) - i_key_start
    p_q = _at(q, i_start + i_query, i_head, stride_q, stride_q_head)
    b_q = _load(p_q, stride_q, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    if allow is not None:
        b_start, b_end = _spans(q_counts, i_sample, MODALITIES, BLOCK_MODALITIES)
        b_key_start, b_key_end = _spans(k_counts, i_sample, MODALITIES, BLOCK_MODALITIES)
        b_allowed = _allowed_by(allow, MODALITIES, BLOCK_MODALITIES)
        some, lacking = _queries_of(b_start, b_end, b_allowed, i_query, MODALITIES, BLOCK_Q)
        b_query = _of_tokens(b_allowed, b_start, b_end, i_query, BLOCK_Q)

    IN_LOG2: tl.constexpr = q.dtype.element_ty != tl.float32
    factor = scale * LOG2_E if IN_LOG2 else scale
    b_out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    b_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_Q,), tl.float32)
    for i_key in range(0, keys, BLOCK_K):
        wanted = True
        if allow is not None:
            held = _keys_of(b_key_start, b_key_end, i_key, MODALITIES, BLOCK_MODALITIES, BLOCK_K)
            wanted = (some & held) != 0
        if wanted:
            i_token, i_kv_head = i_key_start + i_key, i_head // GROUP
            p_k = _at(k, i_token, i_kv_head, stride_k, stride_k_head)
            p_v = _at(v, i_token, i_kv_head, stride_v, stride_v_head)
            b_k = _load(p_k, stride_k, keys - i_key, HEAD_DIM, BLOCK_K, BLOCK_D)
            if q.dtype.element_ty == tl.float32:  # see the head of this file
                b_q = _load(p_q, stride_q, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
            b_score = _dot(b_q, tl.trans(b_k)) * factor
            b_score = tl.where((i_key + tl.arange(0, BLOCK_K) < keys)[None, :], b_score, float("-inf"))
            if allow is not None:  # noqa: SIM102 (known when it is compiled, the next one is not)
                if (lacking & held) != 0:
                    b_key = _labels_of_keys(b_key_start, b_key_end, i_key, MODALITIES, BLOCK_MODALITIES, BLOCK_K)
                    m_score = _attends(allow, b_query[:, None], b_key[None, :], MODALITIES)
                    b_score = tl.where(m_score, b_score, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # no -inf - -inf in a row without keys
            b_weight = _exp(b_score - b_shift[:, None], IN_LOG2)
            b_shrink = _exp(b_max - b_shift, IN_LOG2)
            b_sum = b_sum * b_shrink + tl.sum(b_weight, 1)
            b_max = b_new_max
            b_v = _load(p_v, stride_v, keys - i_key, HEAD_DIM, BLOCK_K, BLOCK_D)
            b_out = b_out * b_shrink[:, None] + _dot(b_weight.to(b_v.dtype), b_v)

    m_none = b_sum == 0.0
    b_sum = tl.where(m_none, 1.0, b_sum)
    b_lse = (b_max + tl.log2(b_sum)) * LN_2 if IN_LOG2 else b_max + tl.log(b_sum)  # -inf where there is no key
    b_out = b_out / b_sum[:, None]
    i_token = i_start + i_query
    p_out = _at(out, i_token, i_head, heads * HEAD_DIM, HEAD_DIM)
    _store(p_out, heads * HEAD_DIM, rows, b_out, HEAD_DIM, BLOCK_Q, BLOCK_D)
    o_row = tl.arange(0, BLOCK_Q)
    tl.store(lse + i_head.to(tl.int64) * total + i_token + o_row, b_lse, mask=o_row < rows)


@triton.jit
def grad_q_kernel(
    grad_out,  # (total, heads, HEAD_DIM)
    q,  # (total, heads, HEAD_DIM)
    k,  # (Tk, heads / GROUP, HEAD_DIM)
    v,  # (Tk, heads / GROUP, HEAD_DIM)
    out,  # (total, heads, HEAD_DIM)
    lse,  # (heads, total)
    delta,  # (heads, total), written: the sum of out * grad_out of every row
    grad_q,  # (total, heads, HEAD_DIM), contiguous
    q_cu_seqlens,  # (samples + 1,)
    k_cu_seqlens,  # (samples + 1,)
    q_counts,  # (samples, MODALITIES)
    k_counts,  # (samples, MODALITIES)
    allow,  # (MODALITIES, MODALITIES) or None
    scale,
    total,
    samples,
    heads,
    tiles,
    stride_g,
    stride_g_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_o,
    stride_o_head,
    GROUP: tl.constexpr,
    MODALITIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_MODALITIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_head, i_tile, i_sample = _place(heads, tiles)
    if i_sample == samples:
        _zero_tail(grad_q, q_cu_seqlens, total, samples, heads, i_head, i_tile, tiles, HEAD_DIM, BLOCK_Q, BLOCK_D)
        return
    i_start, i_query = tl.load(q_cu_seqlens + i_sample), i_tile * BLOCK_Q
    rows = tl.load(q_cu_seqlens + i_sample + 1) - i_start - i_query
    if rows <= 0:
        return
    i_key_start = tl.load(k_cu_seqlens + i_sample)
    keys = tl.load(k_cu_seqlens + i_sample + 1) - i_key_start
    i_row = i_start + i_query
    p_q = _at(q, i_row, i_head, stride_q, stride_q_head)
    p_g = _at(grad_out, i_row, i_head, stride_g, stride_g_head)
    b_q = _load(p_q, stride_q, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    b_g = _load(p_g, stride_g, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    b_o = _load(_at(out, i_row, i_head, stride_o, stride_o_head), stride_o, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    o_row = tl.arange(0, BLOCK_Q)
    o_lse = i_head.to(tl.int64) * total + i_row + o_row
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
    tl.store(delta + o_lse, b_delta, mask=o_row < rows)
    IN_LOG2: tl.constexpr = q.dtype.element_ty != tl.float32
    factor = scale * LOG2_E if IN_LOG2 else scale
    b_lse = _lse(lse + o_lse, o_row < rows, IN_LOG2)
    if allow is not None:
        b_start, b_end = _spans(q_counts, i_sample, MODALITIES, BLOCK_MODALITIES)
        b_key_start, b_key_end = _spans(k_counts, i_sample, MODALITIES, BLOCK_MODALITIES)
        b_allowed = _allowed_by(allow, MODALITIES, BLOCK_MODALITIES)
        some, lacking = _queries_of(b_start, b_end, b_allowed, i_query, MODALITIES, BLOCK_Q)
        b_query = _of_tokens(b_allowed, b_start, b_end, i_query, BLOCK_Q)

    b_grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for i_key in range(0, keys, BLOCK_K):
        wanted = True
        if allow is not None:
            held = _keys_of(b_key_start, b_key_end, i_key, MODALITIES, BLOCK_MODALITIES, BLOCK_K)
            wanted = (some & held) != 0
        if wanted:
            i_token, i_kv_head = i_key_start + i_key, i_head // GROUP
            p_k = _at(k, i_token, i_kv_head, stride_k, stride_k_head)
            p_v = _at(v, i_token, i_kv_head, stride_v, stride_v_head)
            b_k = _load(p_k, stride_k, keys - i_key, HEAD_DIM, BLOCK_K, BLOCK_D)
            b_v = _load(p_v, stride_v, keys - i_key, HEAD_DIM, BLOCK_K, BLOCK_D)
            if q.dtype.element_ty == tl.float32:
                b_q = _load(p_q, stride_q, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
                b_g = _load(p_g, stride_g, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
            b_weight = _exp(_dot(b_q, tl.trans(b_k)) * factor - b_lse[:, None], IN_LOG2)
            b_weight = tl.where((i_key + tl.arange(0, BLOCK_K) < keys)[None, :], b_weight, 0.0)
            if allow is not None:  # noqa: SIM102 (known when it is compiled, the next one is not)
                if (lacking & held) != 0:
                    b_key = _labels_of_keys(b_key_start, b_key_end, i_key, MODALITIES, BLOCK_MODALITIES, BLOCK_K)
                    m_score = _attends(allow, b_query[:, None], b_key[None, :], MODALITIES)
                    b_weight = tl.where(m_score, b_weight, 0.0)
            b_grad_score = b_weight * (_dot(b_g, tl.trans(b_v)) - b_delta[:, None])
            b_grad_q += _dot(b_grad_score.to(b_k.dtype), b_k)

    p_grad_q = _at(grad_q, i_row, i_head, heads * HEAD_DIM, HEAD_DIM)
    _store(p_grad_q, heads * HEAD_DIM, rows, b_grad_q * scale, HEAD_DIM, BLOCK_Q, BLOCK_D)


@triton.jit
def grad_kv_kernel(
    grad_out,  # (Tq, GROUP * heads, HEAD_DIM)
    q,  # (Tq, GROUP * heads, HEAD_DIM)
    k,  # (total, heads, HEAD_DIM)
    v,  # (total, heads, HEAD_DIM)
    lse,  # (GROUP * heads, Tq)
    delta,  # (GROUP * heads, Tq)
    grad_k,  # (total, heads, HEAD_DIM), contiguous
    grad_v,  # (total, heads, HEAD_DIM), contiguous
    q_cu_seqlens,  # (samples + 1,)
    k_cu_seqlens,  # (samples + 1,)
    q_counts,  # (samples, MODALITIES)
    k_counts,  # (samples, MODALITIES)
    allow,  # (MODALITIES, MODALITIES) or None
    scale,
    q_total,
    total,
    samples,
    heads,
    tiles,
    stride_g,
    stride_g_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    GROUP: tl.constexpr,
    MODALITIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_MODALITIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_head, i_tile, i_sample = _place(heads, tiles)
    if i_sample == samples:
        _zero_tail(grad_k, k_cu_seqlens, total, samples, heads, i_head, i_tile, tiles, HEAD_DIM, BLOCK_K, BLOCK_D)
        _zero_tail(grad_v, k_cu_seqlens, total, samples, heads, i_head, i_tile, tiles, HEAD_DIM, BLOCK_K, BLOCK_D)
        return
    i_start, i_key = tl.load(k_cu_seqlens + i_sample), i_tile * BLOCK_K
    rows = tl.load(k_cu_seqlens + i_sample + 1) - i_start - i_key
    if rows <= 0:
        return
    i_query_start = tl.load(q_cu_seqlens + i_sample)
    queries = tl.load(q_cu_seqlens + i_sample + 1) - i_query_start
    i_row = i_start + i_key
    p_k = _at(k, i_row, i_head, stride_k, stride_k_head)
    p_v = _at(v, i_row, i_head, stride_v, stride_v_head)
    b_k = _load(p_k, stride_k, rows, HEAD_DIM, BLOCK_K, BLOCK_D)
    b_v = _load(p_v, stride_v, rows, HEAD_DIM, BLOCK_K, BLOCK_D)
    if allow is not None:
        b_start, b_end = _spans(q_counts, i_sample, MODALITIES, BLOCK_MODALITIES)
        b_key_start, b_key_end = _spans(k_counts, i_sample, MODALITIES, BLOCK_MODALITIES)
        b_allowed = _allowed_by(allow, MODALITIES, BLOCK_MODALITIES)
        held = _keys_of(b_key_start, b_key_end, i_key, MODALITIES, BLOCK_MODALITIES, BLOCK_K)
        b_key = _labels_of_keys(b_key_start, b_key_end, i_key, MODALITIES, BLOCK_MODALITIES, BLOCK_K)

    IN_LOG2: tl.constexpr = q.dtype.element_ty != tl.float32
    factor = scale * LOG2_E if IN_LOG2 else scale
    b_grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    b_grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    o_query = tl.arange(0, BLOCK_Q)
    for i_member in range(GROUP):
        i_q_head = i_head * GROUP + i_member
        for i_query in range(0, queries, BLOCK_Q):
            wanted = True
            if allow is not None:
                some, lacking = _queries_of(b_start, b_end, b_allowed, i_query, MODALITIES, BLOCK_Q)
                wanted = (some & held) != 0
            if wanted:
                i_token = i_query_start + i_query
                p_q = _at(q, i_token, i_q_head, stride_q, stride_q_head)
                p_g = _at(grad_out, i_token, i_q_head, stride_g, stride_g_head)
                b_q = _load(p_q, stride_q, queries - i_query, HEAD_DIM, BLOCK_Q, BLOCK_D)
                b_g = _load(p_g, stride_g, queries - i_query, HEAD_DIM, BLOCK_Q, BLOCK_D)
                o_lse = i_q_head.to(tl.int64) * q_total + i_token + o_query
                m_query = o_query < queries - i_query
                b_lse = _lse(lse + o_lse, m_query, IN_LOG2)
                b_delta = tl.load(delta + o_lse, mask=m_query, other=0.0)
                b_weight = _exp(_dot(b_k, tl.trans(b_q)) * factor - b_lse[None, :], IN_LOG2)  # (keys, queries)
                if allow is not None:  # noqa: SIM102 (known when it is compiled, the next one is not)
                    if (lacking & held) != 0:
                        b_query = _of_tokens(b_allowed, b_start, b_end, i_query, BLOCK_Q)
                        m_score = _attends(allow, b_query[None, :], b_key[:, None], MODALITIES)
                        b_weight = tl.where(m_score, b_weight, 0.0)
                b_grad_v += _dot(b_weight.to(b_g.dtype), b_g)
                b_grad_score = b_weight * (_dot(b_v, tl.trans(b_g)) - b_delta[None, :])
                b_grad_k += _dot(b_grad_score.to(b_q.dtype), b_q)

    p_grad_k = _at(grad_k, i_row, i_head, heads * HEAD_DIM, HEAD_DIM)
    p_grad_v = _at(grad_v, i_row, i_head, heads * HEAD_DIM, HEAD_DIM)
    _store(p_grad_k, heads * HEAD_DIM, rows, b_grad_k * scale, HEAD_DIM, BLOCK_K, BLOCK_D)
    _store(p_grad_v, heads * HEAD_DIM, rows, b_grad_v, HEAD_DIM, BLOCK_K, BLOCK_D)
