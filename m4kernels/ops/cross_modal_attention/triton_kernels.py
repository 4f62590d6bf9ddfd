"""Triton kernels of cross_modal_attention: forward, gradient of the queries, gradients of keys and values.

A program owns one tile of one sample and head and loops over the tiles of the other side, so no two programs add to the
same number: no atomics, the same bits on every run. The grid depends on shapes and `max_seqlen` only; programs beyond a
sample's end leave at once, and those of the sample after the last write the tail. Offsets are 64-bit up to the tile
and 32-bit within. In bfloat16 and float16 scores are in units of log 2, since the hardware has exp2; in float32 the
roundings that this adds to every lse would be the largest error.

Without TF32 the products of float32 blocks run on the ordinary cores, with their operands in registers; blocks of
queries that the whole loop needs would stay there throughout, and spill: they are loaded anew, from the cache, at each
step.
"""

import triton
import triton.language as tl

from m4kernels.ops.cross_modal_attention.triton_blocks import (
    LN_2,
    LOG2_E,
    allowed_by,
    at,
    dot,
    exp,
    load,
    load_lse,
    of_tile,
    of_tokens,
    pack_rows,
    place,
    rows_on,
    spans,
    store,
    tile_at,
    tiles_of,
    unpack_rows,
    where_attended,
    zero_tail,
)


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
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_head, i_tile, i_sample = place(heads, tiles)
    if i_sample == samples:
        zero_tail(out, q_cu_seqlens, total, samples, heads, i_head, i_tile, tiles, HEAD_DIM, BLOCK_Q, BLOCK_D)
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
    p_q = at(q, i_start + i_query, i_head, stride_q, stride_q_head)
    b_q = load(p_q, stride_q, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    if allow is not None:
        b_start, b_end = spans(q_counts, i_sample, MODALITIES)
        b_key_start, b_key_end = spans(k_counts, i_sample, MODALITIES)
        b_bits = allowed_by(allow, MODALITIES, 1, MODALITIES)
        b_query = of_tokens(b_bits, b_start, b_end, i_query, MODALITIES, BLOCK_Q)
        wanted = of_tile(b_bits, b_start, b_end, i_query, BLOCK_Q)
        b_step, b_skip, steps, keys = tiles_of(b_key_start, b_key_end, wanted, MODALITIES, BLOCK_K)
        b_key_end = tl.minimum(b_key_end, keys)
    else:
        steps = keys

    IN_LOG2: tl.constexpr = q.dtype.element_ty != tl.float32
    factor = scale * LOG2_E if IN_LOG2 else scale
    b_out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    b_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_Q,), tl.float32)
    p_keys = at(k, i_key_start, i_head // GROUP, stride_k, stride_k_head)
    p_values = at(v, i_key_start, i_head // GROUP, stride_v, stride_v_head)
    for i_step in range(0, steps, BLOCK_K):
        i_key = i_step
        if allow is not None:
            i_key = tile_at(b_step, b_skip, i_step)
        p_k = rows_on(p_keys, i_key, stride_k)
        p_v = rows_on(p_values, i_key, stride_v)
        b_k = load(p_k, stride_k, keys - i_key, HEAD_DIM, BLOCK_K, BLOCK_D)
        if q.dtype.element_ty == tl.float32:  # see the head of this file
            b_q = load(p_q, stride_q, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
        b_score = dot(b_q, tl.trans(b_k)) * factor
        if allow is None:
            b_score = tl.where((i_key + tl.arange(0, BLOCK_K) < keys)[None, :], b_score, float("-inf"))
        else:
            b_score = where_attended(b_score, True, b_query, b_key_start, b_key_end, i_key, MODALITIES, BLOCK_K)
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # no -inf - -inf in a row without keys
        b_weight = exp(b_score - b_shift[:, None], IN_LOG2)
        b_shrink = exp(b_max - b_shift, IN_LOG2)
        b_sum = b_sum * b_shrink + tl.sum(b_weight, 1)
        b_max = b_new_max
        b_v = load(p_v, stride_v, keys - i_key, HEAD_DIM, BLOCK_K, BLOCK_D)
        b_out = b_out * b_shrink[:, None] + dot(b_weight.to(b_v.dtype), b_v)

    m_none = b_sum == 0.0
    b_sum = tl.where(m_none, 1.0, b_sum)
    b_lse = (b_max + tl.log2(b_sum)) * LN_2 if IN_LOG2 else b_max + tl.log(b_sum)  # -inf where there is no key
    b_out = b_out / b_sum[:, None]
    i_token = i_start + i_query
    p_out = at(out, i_token, i_head, heads * HEAD_DIM, HEAD_DIM)
    store(p_out, heads * HEAD_DIM, rows, b_out, HEAD_DIM, BLOCK_Q, BLOCK_D)
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
    lse_delta,  # (heads, total), written: see pack_rows
    grad_q,  # (total, heads, HEAD_DIM), `pitch` heads from token to token
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
    pitch,
    stride_grad_out,
    stride_grad_out_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_out,
    stride_out_head,
    GROUP: tl.constexpr,
    MODALITIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_head, i_tile, i_sample = place(heads, tiles)
    if i_sample == samples:
        zero_tail(grad_q, q_cu_seqlens, total, samples, pitch, i_head, i_tile, tiles, HEAD_DIM, BLOCK_Q, BLOCK_D)
        return
    i_start, i_query = tl.load(q_cu_seqlens + i_sample), i_tile * BLOCK_Q
    rows = tl.load(q_cu_seqlens + i_sample + 1) - i_start - i_query
    if rows <= 0:
        return
    i_key_start = tl.load(k_cu_seqlens + i_sample)
    keys = tl.load(k_cu_seqlens + i_sample + 1) - i_key_start
    i_row = i_start + i_query
    p_q = at(q, i_row, i_head, stride_q, stride_q_head)
    p_g = at(grad_out, i_row, i_head, stride_grad_out, stride_grad_out_head)
    b_q = load(p_q, stride_q, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    b_g = load(p_g, stride_grad_out, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    b_o = load(at(out, i_row, i_head, stride_out, stride_out_head), stride_out, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    o_row = tl.arange(0, BLOCK_Q)
    o_lse = i_head.to(tl.int64) * total + i_row + o_row
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
    IN_LOG2: tl.constexpr = q.dtype.element_ty != tl.float32
    factor = scale * LOG2_E if IN_LOG2 else scale
    b_lse = load_lse(lse + o_lse, o_row < rows, IN_LOG2)
    tl.store(lse_delta + o_lse, pack_rows(b_lse, b_delta), mask=o_row < rows)
    if allow is not None:
        b_start, b_end = spans(q_counts, i_sample, MODALITIES)
        b_key_start, b_key_end = spans(k_counts, i_sample, MODALITIES)
        b_bits = allowed_by(allow, MODALITIES, 1, MODALITIES)
        b_query = of_tokens(b_bits, b_start, b_end, i_query, MODALITIES, BLOCK_Q)
        wanted = of_tile(b_bits, b_start, b_end, i_query, BLOCK_Q)
        b_step, b_skip, steps, keys = tiles_of(b_key_start, b_key_end, wanted, MODALITIES, BLOCK_K)
        b_key_end = tl.minimum(b_key_end, keys)
    else:
        steps = keys

    b_grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    p_keys = at(k, i_key_start, i_head // GROUP, stride_k, stride_k_head)
    p_values = at(v, i_key_start, i_head // GROUP, stride_v, stride_v_head)
    for i_step in range(0, steps, BLOCK_K):
        i_key = i_step
        if allow is not None:
            i_key = tile_at(b_step, b_skip, i_step)
        p_k = rows_on(p_keys, i_key, stride_k)
        p_v = rows_on(p_values, i_key, stride_v)
        b_k = load(p_k, stride_k, keys - i_key, HEAD_DIM, BLOCK_K, BLOCK_D)
        b_v = load(p_v, stride_v, keys - i_key, HEAD_DIM, BLOCK_K, BLOCK_D)
        if q.dtype.element_ty == tl.float32:
            b_q = load(p_q, stride_q, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
            b_g = load(p_g, stride_grad_out, rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
        b_weight = exp(dot(b_q, tl.trans(b_k)) * factor - b_lse[:, None], IN_LOG2)
        if allow is None:
            b_weight = tl.where((i_key + tl.arange(0, BLOCK_K) < keys)[None, :], b_weight, 0.0)
        else:
            b_weight = where_attended(b_weight, False, b_query, b_key_start, b_key_end, i_key, MODALITIES, BLOCK_K)
        b_grad_score = b_weight * (dot(b_g, tl.trans(b_v)) - b_delta[:, None])
        b_grad_q += dot(b_grad_score.to(b_k.dtype), b_k)

    p_grad_q = at(grad_q, i_row, i_head, pitch * HEAD_DIM, HEAD_DIM)
    store(p_grad_q, pitch * HEAD_DIM, rows, b_grad_q * scale, HEAD_DIM, BLOCK_Q, BLOCK_D)


@triton.jit
def grad_kv_kernel(
    grad_out,  # (Tq, GROUP * heads, HEAD_DIM)
    q,  # (Tq, GROUP * heads, HEAD_DIM)
    k,  # (total, heads, HEAD_DIM)
    v,  # (total, heads, HEAD_DIM)
    lse_delta,  # (GROUP * heads, Tq), from grad_q_kernel
    grad_k,  # (total, heads, HEAD_DIM), `pitch` heads from token to token
    grad_v,  # (total, heads, HEAD_DIM), likewise
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
    pitch,
    stride_grad_out,
    stride_grad_out_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    GROUP: tl.constexpr,
    MODALITIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_head, i_tile, i_sample = place(heads, tiles)
    if i_sample == samples:
        zero_tail(grad_k, k_cu_seqlens, total, samples, pitch, i_head, i_tile, tiles, HEAD_DIM, BLOCK_K, BLOCK_D)
        zero_tail(grad_v, k_cu_seqlens, total, samples, pitch, i_head, i_tile, tiles, HEAD_DIM, BLOCK_K, BLOCK_D)
        return
    i_start, i_key = tl.load(k_cu_seqlens + i_sample), i_tile * BLOCK_K
    rows = tl.load(k_cu_seqlens + i_sample + 1) - i_start - i_key
    if rows <= 0:
        return
    i_query_start = tl.load(q_cu_seqlens + i_sample)
    queries = tl.load(q_cu_seqlens + i_sample + 1) - i_query_start
    i_row = i_start + i_key
    p_k = at(k, i_row, i_head, stride_k, stride_k_head)
    p_v = at(v, i_row, i_head, stride_v, stride_v_head)
    b_k = load(p_k, stride_k, rows, HEAD_DIM, BLOCK_K, BLOCK_D)
    b_v = load(p_v, stride_v, rows, HEAD_DIM, BLOCK_K, BLOCK_D)
    if allow is not None:
        b_start, b_end = spans(q_counts, i_sample, MODALITIES)
        b_key_start, b_key_end = spans(k_counts, i_sample, MODALITIES)
        b_bits = allowed_by(allow, 1, MODALITIES, MODALITIES)
        b_key = of_tokens(b_bits, b_key_start, b_key_end, i_key, MODALITIES, BLOCK_K)
        wanted = of_tile(b_bits, b_key_start, b_key_end, i_key, BLOCK_K)
        b_step, b_skip, steps, queries = tiles_of(b_start, b_end, wanted, MODALITIES, BLOCK_Q)
        b_end = tl.minimum(b_end, queries)
    else:
        steps = queries

    IN_LOG2: tl.constexpr = q.dtype.element_ty != tl.float32
    factor = scale * LOG2_E if IN_LOG2 else scale
    b_grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    b_grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    o_query = tl.arange(0, BLOCK_Q)
    for i_member in range(GROUP):
        i_q_head = i_head * GROUP + i_member
        p_queries = at(q, i_query_start, i_q_head, stride_q, stride_q_head)
        p_grads = at(grad_out, i_query_start, i_q_head, stride_grad_out, stride_grad_out_head)
        p_row = lse_delta + i_q_head.to(tl.int64) * q_total + i_query_start
        for i_step in range(0, steps, BLOCK_Q):
            i_query = i_step
            if allow is not None:
                i_query = tile_at(b_step, b_skip, i_step)
            p_q = rows_on(p_queries, i_query, stride_q)
            p_g = rows_on(p_grads, i_query, stride_grad_out)
            b_q = load(p_q, stride_q, queries - i_query, HEAD_DIM, BLOCK_Q, BLOCK_D)
            b_g = load(p_g, stride_grad_out, queries - i_query, HEAD_DIM, BLOCK_Q, BLOCK_D)
            b_row = tl.load(p_row + i_query + o_query, mask=o_query < queries - i_query, other=0)
            b_lse, b_delta = unpack_rows(b_row)
            b_weight = exp(dot(b_k, tl.trans(b_q)) * factor - b_lse[None, :], IN_LOG2)  # (keys, queries)
            if allow is not None:
                b_weight = where_attended(b_weight, False, b_key, b_start, b_end, i_query, MODALITIES, BLOCK_Q)
            b_grad_v += dot(b_weight.to(b_g.dtype), b_g)
            b_grad_score = b_weight * (dot(b_v, tl.trans(b_g)) - b_delta[None, :])
            b_grad_k += dot(b_grad_score.to(b_q.dtype), b_q)

    p_grad_k = at(grad_k, i_row, i_head, pitch * HEAD_DIM, HEAD_DIM)
    p_grad_v = at(grad_v, i_row, i_head, pitch * HEAD_DIM, HEAD_DIM)
    store(p_grad_k, pitch * HEAD_DIM, rows, b_grad_k * scale, HEAD_DIM, BLOCK_K, BLOCK_D)
    store(p_grad_v, pitch * HEAD_DIM, rows, b_grad_v, HEAD_DIM, BLOCK_K, BLOCK_D)
