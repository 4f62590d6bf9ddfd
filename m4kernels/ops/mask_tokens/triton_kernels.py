"""The two Triton kernels of mask_tokens, a transcription of `reference.py` in its order and with its names.

Two launches, because where a sample's tokens go depends on the counts of all samples before it. `draw_kernel` draws
the counts of blocks of samples, with a running sum within the block; `fill_kernel` adds the blocks' sums, which is one
short load for each program, and writes everything else. A pair of numbers of tokens, at most 2^31 - 1 each by the op's
checks, is one int64: inputs in the low half, targets in the high half. Loops whose ends are not constants are `while`
loops, because under recent versions of NumPy the interpreter of Triton 3.6 has no `range` over a tensor.
"""

import triton
import triton.language as tl

from m4kernels.ops.mask_tokens import reference
from m4kernels.ops.mask_tokens.make_tables import KNOTS as _KNOTS
from m4kernels.segments import IGNORE_INDEX

SIZES = tl.constexpr(reference.SIZES)
INPUT_DIRICHLET = tl.constexpr(reference.INPUT_DIRICHLET)
INPUT_LEFTOVERS = tl.constexpr(reference.INPUT_LEFTOVERS)
TARGET_DIRICHLET = tl.constexpr(reference.TARGET_DIRICHLET)
TARGET_LEFTOVERS = tl.constexpr(reference.TARGET_LEFTOVERS)
POSITIONS = tl.constexpr(reference.POSITIONS)
KNOTS = tl.constexpr(_KNOTS)
TARGET_FILL = tl.constexpr(IGNORE_INDEX)
LOWEST = tl.constexpr(-(2**40))  # below every log2 of a Gamma draw

# Arguments that change from call to call, and must not compile the kernel anew.
VARYING = ("seed_low", "seed_high", "epoch", "batch", "blocks", "in_capacity", "out_capacity")


@triton.jit
def _philox(seed_low, seed_high, epoch, ids, c0):
    """The four words of the blocks with first counter word c0, for int64 sample ids; all broadcast."""
    # tl.philox takes 32-bit words from the counters' type, and would sign-extend a key that is not 64 bits.
    low, high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    key = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return tl.philox(key, c0, epoch.to(tl.uint32, bitcast=True), ids.to(tl.uint32), (ids >> 32).to(tl.uint32))


@triton.jit
def _counter(PURPOSE: tl.constexpr, modality, block):
    return ((modality << 16) + block + (PURPOSE << 24)).to(tl.uint32)


@triton.jit
def _log_gamma_draw(word, p_table, m_plays):
    """log2 of Gamma draws, Q20: uint32 words, the alphas' tables → int64."""
    tail = word.to(tl.int32, bitcast=True) >> 31  # 0 or -1, which inverts the word
    v = (((word.to(tl.int32, bitcast=True) ^ tail) << 1) | 1).to(tl.uint32, bitcast=True)
    # The leading bit is the exponent of v as a float. Without the bit after it, v cannot round up to the next power.
    e = ((v & (v ^ (v >> 1))).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    h = ((v << (31 - e).to(tl.uint32)) & 0x7FFFFFFF).to(tl.int32)
    p_knot = p_table + (64 * e + (h >> 25) - tail * KNOTS)
    low = tl.load(p_knot, mask=m_plays, other=0).to(tl.int64)
    rise = tl.load(p_knot + 1, mask=m_plays, other=0).to(tl.int64) - low
    return tl.where(m_plays, low + (rise * (h & 0x1FFFFFF).to(tl.int64) >> 25), LOWEST)


@triton.jit
def _divide(a, b):
    """a // b of int64 with 0 <= a, 0 < b and a quotient below 2^32: exact, without the long 64-bit division.

    Two Newton steps take the float32 reciprocal to a relative error below 2^-43, so the quotient is off by 1 at most,
    which the remainder shows.
    """
    divisor = b.to(tl.float64)
    inverse = (1.0 / b.to(tl.float32)).to(tl.float64)
    inverse = inverse * (2.0 - divisor * inverse)
    inverse = inverse * (2.0 - divisor * inverse)
    quotient = (a.to(tl.float64) * inverse).to(tl.int64)
    rest = a - quotient * b
    return quotient + (rest >= b).to(tl.int64) - (rest < 0).to(tl.int64)


@triton.jit
def _give(budgets, word, i_leftover, left, i_modality, p_table, m_plays):
    """budgets with leftover number i_leftover, where there is one, given to the largest fresh draw."""
    g = _log_gamma_draw(word, p_table, m_plays)
    winner = 255 - (tl.max((g << 8) + (255 - i_modality), 1) & 255)  # the lowest modality on a tie
    return budgets + ((i_modality == winner[:, None]) & (i_leftover < left)[:, None]).to(tl.int64)


@triton.jit
def _budgets(
    n,  # (BLOCK_B,)
    ids,  # (BLOCK_B, 1)
    rows,  # (1, BLOCK_M)
    i_modality,  # (1, BLOCK_M)
    gamma,
    exp2,
    seed_low,
    seed_high,
    epoch,
    DIRICHLET: tl.constexpr,
    LEFTOVERS: tl.constexpr,
):
    """int64 (BLOCK_B, BLOCK_M): the Dirichlet budgets of n tokens."""
    m_plays = rows >= 0
    p_table = gamma + rows * (2 * KNOTS)
    word, _, _, _ = _philox(seed_low, seed_high, epoch, ids, _counter(DIRICHLET, i_modality, 0))
    g = _log_gamma_draw(word, p_table, m_plays)
    d = tl.max(g, 1)[:, None] - g
    f = (d & 0xFFFFF).to(tl.int32)
    low = tl.load(exp2 + (f >> 10))
    rise = tl.load(exp2 + (f >> 10) + 1) - low
    weight = (low + (rise * (f & 1023) >> 10)) >> tl.minimum(d >> 20, 31).to(tl.int32)
    weight = tl.where(m_plays, weight, 0).to(tl.int64)
    budgets = _divide(n[:, None] * weight, tl.sum(weight, 1)[:, None])
    left = n - tl.sum(budgets, 1)
    most = tl.max(left, 0).to(tl.int32)
    q = 0
    while 4 * q < most:
        w0, w1, w2, w3 = _philox(seed_low, seed_high, epoch, ids, _counter(LEFTOVERS, i_modality, q))
        budgets = _give(budgets, w0, 4 * q, left, i_modality, p_table, m_plays)
        budgets = _give(budgets, w1, 4 * q + 1, left, i_modality, p_table, m_plays)
        budgets = _give(budgets, w2, 4 * q + 2, left, i_modality, p_table, m_plays)
        budgets = _give(budgets, w3, 4 * q + 3, left, i_modality, p_table, m_plays)
        q += 1
    return budgets


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=("faults",))
def draw_kernel(
    sample_ids,  # (B,), stride ids_b
    lengths,  # (B, M), strides (lengths_b, lengths_m), or None for full
    layout,  # int32 (4 M + 4,): see triton.py
    gamma,  # int32 (alphas, 2, KNOTS)
    exp2,  # int32 (1025,)
    in_counts,  # int32 (B, M)
    out_counts,  # int32 (B, M)
    starts,  # int64 (B,): pairs, tokens of the block's samples before this one
    sums,  # int64 (blocks,): pairs, tokens of a block
    faults,  # int64 (blocks,): lengths out of range
    ids_b,
    lengths_b,
    lengths_m,
    batch,
    seed_low,
    seed_high,
    epoch,
    MODALITIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_sample = i_block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_sample = i_sample < batch
    i_modality = tl.arange(0, BLOCK_M)[None, :]
    m_modality = i_modality < MODALITIES
    m_both = m_sample[:, None] & m_modality
    ids = tl.load(sample_ids + i_sample * ids_b, mask=m_sample, other=0)[:, None]
    in_rows = tl.load(layout + i_modality, mask=m_modality, other=-1)
    out_rows = tl.load(layout + MODALITIES + i_modality, mask=m_modality, other=-1)
    longest = tl.load(layout + 2 * MODALITIES + i_modality, mask=m_modality, other=0).to(tl.int64)
    available = longest
    if lengths is not None:
        p_length = lengths + i_sample[:, None] * lengths_b + i_modality * lengths_m
        length = tl.load(p_length, mask=m_both, other=0).to(tl.int64)
        available = tl.minimum(tl.maximum(length, 0), longest)
        tl.store(faults + i_block, tl.sum(tl.sum((length != available).to(tl.int64), 1), 0))

    p_range = layout + 4 * MODALITIES
    in_low, in_high = tl.load(p_range).to(tl.int64), tl.load(p_range + 1).to(tl.int64)
    out_low, out_high = tl.load(p_range + 2).to(tl.int64), tl.load(p_range + 3).to(tl.int64)
    w0, w1, _, _ = _philox(seed_low, seed_high, epoch, ids, _counter(SIZES, tl.zeros_like(ids), 0))
    n_in = in_low + (tl.sum(w0.to(tl.int64), 1) * (in_high - in_low + 1) >> 32)  # a sum of one
    n_out = out_low + (tl.sum(w1.to(tl.int64), 1) * (out_high - out_low + 1) >> 32)
    inputs = _budgets(
        *(n_in, ids, in_rows, i_modality, gamma, exp2, seed_low, seed_high, epoch),
        INPUT_DIRICHLET,
        INPUT_LEFTOVERS,
    )
    targets = _budgets(
        *(n_out, ids, out_rows, i_modality, gamma, exp2, seed_low, seed_high, epoch),
        TARGET_DIRICHLET,
        TARGET_LEFTOVERS,
    )
    inputs = tl.minimum(inputs, available)
    targets = tl.minimum(targets, available - inputs)
    o_count = i_sample[:, None] * MODALITIES + i_modality
    tl.store(in_counts + o_count, inputs.to(tl.int32), mask=m_both)
    tl.store(out_counts + o_count, targets.to(tl.int32), mask=m_both)
    pair = tl.where(m_sample, tl.sum(inputs + (targets << 32), 1), 0)
    tl.store(starts + i_sample, tl.cumsum(pair, 0) - pair, mask=m_sample)
    tl.store(sums + i_block, tl.sum(pair, 0))


@triton.jit
def _chosen(key, m_position, in_count, out_count):
    """bool (BLOCK_S, BLOCK_N) twice, inputs and targets: of the valid positions ordered by (key, position) the first
    in_count (BLOCK_S,), and the next out_count.

    For each k the largest T with #{key < T} <= k is found bit by bit: it is the first key not among the k, so the k
    are those below T and, of those equal to T, the first. Two counts, at most 2^12 each, are summed as one number.
    """
    key = tl.where(m_position, key, 0xFFFFFFFF)  # never below a T
    both = in_count + out_count
    in_least = tl.zeros_like(both).to(tl.uint32)
    out_least = in_least
    in_below = tl.zeros_like(both)
    out_below = in_below
    for i in range(32):
        bit = tl.full((), 0x80000000, tl.uint32) >> i
        in_next, out_next = in_least | bit, out_least | bit
        below = (key < in_next[:, None]).to(tl.int32) + ((key < out_next[:, None]).to(tl.int32) << 16)
        below = tl.sum(below, 1)
        in_fits, out_fits = (below & 0xFFFF) <= in_count, (below >> 16) <= both
        in_least, in_below = tl.where(in_fits, in_next, in_least), tl.where(in_fits, below & 0xFFFF, in_below)
        out_least, out_below = tl.where(out_fits, out_next, out_least), tl.where(out_fits, below >> 16, out_below)
    in_tie = (key == in_least[:, None]) & m_position
    out_tie = (key == out_least[:, None]) & m_position
    tie = in_tie.to(tl.int32) + (out_tie.to(tl.int32) << 16)
    rank = tl.cumsum(tie, 1) - tie
    is_input = (key < in_least[:, None]) | (in_tie & ((rank & 0xFFFF) < (in_count - in_below)[:, None]))
    is_either = (key < out_least[:, None]) | (out_tie & ((rank >> 16) < (both - out_below)[:, None]))
    return is_input, is_either & (is_input == 0)


@triton.jit
def _write(ids, positions, modalities, place, capacity, m_chosen, token, position, modality):
    m_chosen = m_chosen & (place < capacity)
    tl.store(ids + place, token, mask=m_chosen)
    tl.store(positions + place, position, mask=m_chosen)
    tl.store(modalities + place, modality, mask=m_chosen)


@triton.jit
def _write_tail(ids, positions, modalities, first, capacity, i_program, programs, FILL: tl.constexpr):
    """Tokens of no sample from `first` to the capacity; the programs take turns."""
    BLOCK: tl.constexpr = 128
    begin = first + i_program * BLOCK
    while begin < capacity:
        place = begin + tl.arange(0, BLOCK)
        nothing = tl.zeros((BLOCK,), tl.int64)
        _write(ids, positions, modalities, place, capacity, place < capacity, nothing + FILL, nothing, nothing)
        begin += programs * BLOCK


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=("faults",))
def fill_kernel(
    tokens,  # (B, L), strides (tokens_b, tokens_l)
    sample_ids,  # (B,), stride ids_b
    lengths,  # (B, M), strides (lengths_b, lengths_m), or None for full
    layout,  # int32 (4 M + 4,): see triton.py
    in_counts,  # int32 (B, M)
    out_counts,  # int32 (B, M)
    starts,  # int64 (B,): of draw_kernel
    sums,  # int64 (blocks,): of draw_kernel
    faults,  # int64 (blocks,): of draw_kernel, if there are lengths
    in_ids,  # int64 (in_capacity,)
    in_positions,
    in_modalities,
    in_cu,  # int32 (B + 1,)
    out_ids,  # int64 (out_capacity,)
    out_positions,
    out_modalities,
    out_cu,  # int32 (B + 1,)
    ok,  # bool (1,): no fault, and the tokens fit
    tokens_b,
    tokens_l,
    ids_b,
    lengths_b,
    lengths_m,
    batch,
    blocks,
    in_capacity,
    out_capacity,
    seed_low,
    seed_high,
    epoch,
    MODALITIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # positions: at least the longest modality
    BLOCK_S: tl.constexpr,  # samples of this program, all of them of one block of draw_kernel
    BLOCK_B: tl.constexpr,  # samples of a block of draw_kernel
    CHUNK: tl.constexpr,  # blocks whose sums are read at once
):
    i_tile, i_modality = tl.program_id(0), tl.program_id(1)
    i_sample = i_tile.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_sample = i_sample < batch

    # Where this program's samples begin.
    before = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.int64)
    wrong = tl.zeros((), tl.int64)
    begin = 0
    while begin < blocks:
        i_block = begin + tl.arange(0, CHUNK)
        b_sum = tl.load(sums + i_block, mask=i_block < blocks, other=0)
        before += tl.sum(tl.where(i_block < i_tile * BLOCK_S // BLOCK_B, b_sum, 0), 0)
        total += tl.sum(b_sum, 0)
        if lengths is not None:
            wrong += tl.sum(tl.load(faults + i_block, mask=i_block < blocks, other=0), 0)
        begin += CHUNK
    start = before + tl.load(starts + i_sample, mask=m_sample, other=0)
    in_total, out_total = total & 0xFFFFFFFF, total >> 32
    in_start, out_start = start & 0xFFFFFFFF, start >> 32
    if i_modality == 0:
        tl.store(in_cu + i_sample, in_start.to(tl.int32), mask=m_sample)
        tl.store(out_cu + i_sample, out_start.to(tl.int32), mask=m_sample)
        if i_tile == 0:
            tl.store(in_cu + batch, in_total.to(tl.int32))
            tl.store(out_cu + batch, out_total.to(tl.int32))
            tl.store(ok, (wrong == 0) & (in_total <= in_capacity) & (out_total <= out_capacity))

    i_each = tl.arange(0, BLOCK_M)[None, :]
    o_count = i_sample[:, None] * MODALITIES + i_each
    m_count = m_sample[:, None] & (i_each < MODALITIES)
    b_in = tl.load(in_counts + o_count, mask=m_count, other=0)
    b_out = tl.load(out_counts + o_count, mask=m_count, other=0)
    in_start += tl.sum(tl.where(i_each < i_modality, b_in, 0), 1)
    out_start += tl.sum(tl.where(i_each < i_modality, b_out, 0), 1)
    in_count = tl.sum(tl.where(i_each == i_modality, b_in, 0), 1)
    out_count = tl.sum(tl.where(i_each == i_modality, b_out, 0), 1)

    available = tl.load(layout + 2 * MODALITIES + i_modality) + tl.zeros((BLOCK_S,), tl.int32)
    if lengths is not None:
        length = tl.load(lengths + i_sample * lengths_b + i_modality * lengths_m, mask=m_sample, other=0)
        available = tl.minimum(tl.maximum(length.to(tl.int64), 0), available).to(tl.int32)
    ids = tl.load(sample_ids + i_sample * ids_b, mask=m_sample, other=0)[:, None]
    i_quad = tl.arange(0, BLOCK_N // 4)[None, :]
    w0, w1, w2, w3 = _philox(seed_low, seed_high, epoch, ids, _counter(POSITIONS, i_modality, i_quad))
    key = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # position j has word j & 3 of block j >> 2

    position = tl.arange(0, BLOCK_N)[None, :]
    m_position = m_sample[:, None] & (position < available[:, None])
    is_input, is_target = _chosen(key, m_position, in_count, out_count)
    flag = is_input.to(tl.int32) + (is_target.to(tl.int32) << 16)
    rank = tl.cumsum(flag, 1) - flag  # among the chosen of its kind
    o_token = (tl.load(layout + 3 * MODALITIES + i_modality) + position).to(tl.int64) * tokens_l
    p_token = tokens + i_sample[:, None] * tokens_b + o_token
    token = tl.load(p_token, mask=is_input | is_target, other=0).to(tl.int64)
    position = position.to(tl.int64) + tl.zeros_like(token)
    modality = i_modality.to(tl.int64) + tl.zeros_like(token)
    in_place, out_place = in_start[:, None] + (rank & 0xFFFF), out_start[:, None] + (rank >> 16)
    _write(in_ids, in_positions, in_modalities, in_place, in_capacity, is_input, token, position, modality)
    _write(out_ids, out_positions, out_modalities, out_place, out_capacity, is_target, token, position, modality)

    i_program, programs = i_tile * MODALITIES + i_modality, tl.num_programs(0) * MODALITIES
    _write_tail(in_ids, in_positions, in_modalities, in_total, in_capacity, i_program, programs, 0)
    _write_tail(out_ids, out_positions, out_modalities, out_total, out_capacity, i_program, programs, TARGET_FILL)
