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
def _philox(seed_low, seed_high, epoch, b_id, b_counter):
    """The four words of the blocks with first counter word b_counter, for int64 sample ids; all broadcast."""
    # tl.philox takes 32-bit words from the counters' type, and would sign-extend a key that is not 64 bits.
    low, high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    key = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return tl.philox(key, b_counter, epoch.to(tl.uint32, bitcast=True), b_id.to(tl.uint32), (b_id >> 32).to(tl.uint32))


@triton.jit
def _counter(PURPOSE: tl.constexpr, i_modality, i_block):
    return ((i_modality << 16) + i_block + (PURPOSE << 24)).to(tl.uint32)


@triton.jit
def _log_gamma_draw(b_word, p_table, m_plays):
    """log2 of Gamma draws, Q20: uint32 words, the alphas' tables → int64."""
    b_tail = b_word.to(tl.int32, bitcast=True) >> 31  # 0 or -1, which inverts the word
    b_v = (((b_word.to(tl.int32, bitcast=True) ^ b_tail) << 1) | 1).to(tl.uint32, bitcast=True)
    # The leading bit is the exponent of v as a float. Without the bit after it, v cannot round up to the next power.
    b_e = ((b_v & (b_v ^ (b_v >> 1))).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    b_h = ((b_v << (31 - b_e).to(tl.uint32)) & 0x7FFFFFFF).to(tl.int32)
    p_knot = p_table + (64 * b_e + (b_h >> 25) - b_tail * KNOTS)
    b_low = tl.load(p_knot, mask=m_plays, other=0).to(tl.int64)
    b_rise = tl.load(p_knot + 1, mask=m_plays, other=0).to(tl.int64) - b_low
    return tl.where(m_plays, b_low + (b_rise * (b_h & 0x1FFFFFF).to(tl.int64) >> 25), LOWEST)


@triton.jit
def _divide(b_a, b_b):
    """b_a // b_b of int64 with 0 <= a, 0 < b and a quotient below 2^32: exact, without the long 64-bit division.

    Two Newton steps take the float32 reciprocal to a relative error below 2^-43, so the quotient is off by 1 at most,
    which the remainder shows.
    """
    b_divisor = b_b.to(tl.float64)
    b_inverse = (1.0 / b_b.to(tl.float32)).to(tl.float64)
    b_inverse = b_inverse * (2.0 - b_divisor * b_inverse)
    b_inverse = b_inverse * (2.0 - b_divisor * b_inverse)
    b_quotient = (b_a.to(tl.float64) * b_inverse).to(tl.int64)
    b_rest = b_a - b_quotient * b_b
    return b_quotient + (b_rest >= b_b).to(tl.int64) - (b_rest < 0).to(tl.int64)


@triton.jit
def _give(b_budget, b_word, i_leftover, b_left, i_modality, p_table, m_plays):
    """b_budget with leftover number i_leftover, where there is one, given to the largest fresh draw."""
    b_gamma = _log_gamma_draw(b_word, p_table, m_plays)
    b_winner = 255 - (tl.max((b_gamma << 8) + (255 - i_modality), 1) & 255)  # the lowest modality on a tie
    return b_budget + ((i_modality == b_winner[:, None]) & (i_leftover < b_left)[:, None]).to(tl.int64)


@triton.jit
def _budgets(
    b_n,  # (BLOCK_B,)
    b_id,  # (BLOCK_B, 1)
    b_row,  # (1, BLOCK_M)
    i_modality,  # (1, BLOCK_M)
    gamma,  # int32 (alphas, 2, KNOTS)
    exp2,  # int32 (1025,)
    seed_low,
    seed_high,
    epoch,
    DIRICHLET: tl.constexpr,
    LEFTOVERS: tl.constexpr,
):
    """int64 (BLOCK_B, BLOCK_M): the Dirichlet budgets of n tokens."""
    m_plays = b_row >= 0
    p_table = gamma + b_row * (2 * KNOTS)
    b_word, _, _, _ = _philox(seed_low, seed_high, epoch, b_id, _counter(DIRICHLET, i_modality, 0))
    b_gamma = _log_gamma_draw(b_word, p_table, m_plays)
    b_d = tl.max(b_gamma, 1)[:, None] - b_gamma
    b_f = (b_d & 0xFFFFF).to(tl.int32)
    b_low = tl.load(exp2 + (b_f >> 10))
    b_rise = tl.load(exp2 + (b_f >> 10) + 1) - b_low
    b_weight = (b_low + (b_rise * (b_f & 1023) >> 10)) >> tl.minimum(b_d >> 20, 31).to(tl.int32)
    b_weight = tl.where(m_plays, b_weight, 0).to(tl.int64)
    b_budget = _divide(b_n[:, None] * b_weight, tl.sum(b_weight, 1)[:, None])
    b_left = b_n - tl.sum(b_budget, 1)
    most = tl.max(b_left, 0).to(tl.int32)
    i_block = 0
    while 4 * i_block < most:
        b_w0, b_w1, b_w2, b_w3 = _philox(seed_low, seed_high, epoch, b_id, _counter(LEFTOVERS, i_modality, i_block))
        b_budget = _give(b_budget, b_w0, 4 * i_block, b_left, i_modality, p_table, m_plays)
        b_budget = _give(b_budget, b_w1, 4 * i_block + 1, b_left, i_modality, p_table, m_plays)
        b_budget = _give(b_budget, b_w2, 4 * i_block + 2, b_left, i_modality, p_table, m_plays)
        b_budget = _give(b_budget, b_w3, 4 * i_block + 3, b_left, i_modality, p_table, m_plays)
        i_block += 1
    return b_budget


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
    b_id = tl.load(sample_ids + i_sample * ids_b, mask=m_sample, other=0)[:, None]
    b_in_row = tl.load(layout + i_modality, mask=m_modality, other=-1)
    b_out_row = tl.load(layout + MODALITIES + i_modality, mask=m_modality, other=-1)
    b_longest = tl.load(layout + 2 * MODALITIES + i_modality, mask=m_modality, other=0).to(tl.int64)
    b_available = b_longest
    if lengths is not None:
        p_length = lengths + i_sample[:, None] * lengths_b + i_modality * lengths_m
        b_length = tl.load(p_length, mask=m_both, other=0).to(tl.int64)
        b_available = tl.minimum(tl.maximum(b_length, 0), b_longest)
        tl.store(faults + i_block, tl.sum(tl.sum((b_length != b_available).to(tl.int64), 1), 0))

    p_range = layout + 4 * MODALITIES
    in_low, in_high = tl.load(p_range).to(tl.int64), tl.load(p_range + 1).to(tl.int64)
    out_low, out_high = tl.load(p_range + 2).to(tl.int64), tl.load(p_range + 3).to(tl.int64)
    b_w0, b_w1, _, _ = _philox(seed_low, seed_high, epoch, b_id, _counter(SIZES, tl.zeros_like(b_id), 0))
    b_n_in = in_low + (tl.sum(b_w0.to(tl.int64), 1) * (in_high - in_low + 1) >> 32)  # a sum of one
    b_n_out = out_low + (tl.sum(b_w1.to(tl.int64), 1) * (out_high - out_low + 1) >> 32)
    b_inputs = _budgets(
        *(b_n_in, b_id, b_in_row, i_modality, gamma, exp2, seed_low, seed_high, epoch),
        INPUT_DIRICHLET,
        INPUT_LEFTOVERS,
    )
    b_targets = _budgets(
        *(b_n_out, b_id, b_out_row, i_modality, gamma, exp2, seed_low, seed_high, epoch),
        TARGET_DIRICHLET,
        TARGET_LEFTOVERS,
    )
    b_inputs = tl.minimum(b_inputs, b_available)
    b_targets = tl.minimum(b_targets, b_available - b_inputs)
    o_count = i_sample[:, None] * MODALITIES + i_modality
    tl.store(in_counts + o_count, b_inputs.to(tl.int32), mask=m_both)
    tl.store(out_counts + o_count, b_targets.to(tl.int32), mask=m_both)
    b_pair = tl.where(m_sample, tl.sum(b_inputs + (b_targets << 32), 1), 0)
    tl.store(starts + i_sample, tl.cumsum(b_pair, 0) - b_pair, mask=m_sample)
    tl.store(sums + i_block, tl.sum(b_pair, 0))


@triton.jit
def _chosen(b_key, m_position, b_in_count, b_out_count):
    """bool (BLOCK_S, BLOCK_N) twice, inputs and targets: of the valid positions ordered by (key, position) the first
    b_in_count (BLOCK_S,), and the next b_out_count.

    For each k the largest T with #{key < T} <= k is found bit by bit: it is the first key not among the k, so the k
    are those below T and, of those equal to T, the first. Two counts, at most 2^12 each, are summed as one number.
    """
    b_key = tl.where(m_position, b_key, 0xFFFFFFFF)  # never below a T
    b_both = b_in_count + b_out_count
    b_in_least = tl.zeros_like(b_both).to(tl.uint32)
    b_out_least = b_in_least
    b_in_below = tl.zeros_like(b_both)
    b_out_below = b_in_below
    for i in range(32):
        b_bit = tl.full((), 0x80000000, tl.uint32) >> i
        b_in_next, b_out_next = b_in_least | b_bit, b_out_least | b_bit
        b_below = (b_key < b_in_next[:, None]).to(tl.int32) + ((b_key < b_out_next[:, None]).to(tl.int32) << 16)
        b_below = tl.sum(b_below, 1)
        m_in_fits, m_out_fits = (b_below & 0xFFFF) <= b_in_count, (b_below >> 16) <= b_both
        b_in_least, b_in_below = (
            tl.where(m_in_fits, b_in_next, b_in_least),
            tl.where(m_in_fits, b_below & 0xFFFF, b_in_below),
        )
        b_out_least, b_out_below = (
            tl.where(m_out_fits, b_out_next, b_out_least),
            tl.where(m_out_fits, b_below >> 16, b_out_below),
        )
    m_in_tie = (b_key == b_in_least[:, None]) & m_position
    m_out_tie = (b_key == b_out_least[:, None]) & m_position
    b_tie = m_in_tie.to(tl.int32) + (m_out_tie.to(tl.int32) << 16)
    b_rank = tl.cumsum(b_tie, 1) - b_tie
    m_input = (b_key < b_in_least[:, None]) | (m_in_tie & ((b_rank & 0xFFFF) < (b_in_count - b_in_below)[:, None]))
    m_either = (b_key < b_out_least[:, None]) | (m_out_tie & ((b_rank >> 16) < (b_both - b_out_below)[:, None]))
    return m_input, m_either & (m_input == 0)


@triton.jit
def _write(
    ids,  # int64 (capacity,)
    positions,  # int64 (capacity,)
    modalities,  # int64 (capacity,)
    o_place,
    capacity,
    m_chosen,
    b_token,
    b_position,
    b_modality,
):
    m_chosen = m_chosen & (o_place < capacity)
    tl.store(ids + o_place, b_token, mask=m_chosen)
    tl.store(positions + o_place, b_position, mask=m_chosen)
    tl.store(modalities + o_place, b_modality, mask=m_chosen)


@triton.jit
def _write_tail(
    ids,  # int64 (capacity,)
    positions,  # int64 (capacity,)
    modalities,  # int64 (capacity,)
    first,
    capacity,
    i_program,
    programs,
    FILL: tl.constexpr,
):
    """Tokens of no sample from `first` to the capacity; the programs take turns."""
    BLOCK: tl.constexpr = 128
    begin = first + i_program * BLOCK
    while begin < capacity:
        o_place = begin + tl.arange(0, BLOCK)
        b_nothing = tl.zeros((BLOCK,), tl.int64)
        _write(
            ids, positions, modalities, o_place, capacity, o_place < capacity, b_nothing + FILL, b_nothing, b_nothing
        )
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
    in_positions,  # int64 (in_capacity,)
    in_modalities,  # int64 (in_capacity,)
    in_cu,  # int32 (B + 1,)
    out_ids,  # int64 (out_capacity,)
    out_positions,  # int64 (out_capacity,)
    out_modalities,  # int64 (out_capacity,)
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
    b_start = before + tl.load(starts + i_sample, mask=m_sample, other=0)
    in_total, out_total = total & 0xFFFFFFFF, total >> 32
    b_in_start, b_out_start = b_start & 0xFFFFFFFF, b_start >> 32
    if i_modality == 0:
        tl.store(in_cu + i_sample, b_in_start.to(tl.int32), mask=m_sample)
        tl.store(out_cu + i_sample, b_out_start.to(tl.int32), mask=m_sample)
        if i_tile == 0:
            tl.store(in_cu + batch, in_total.to(tl.int32))
            tl.store(out_cu + batch, out_total.to(tl.int32))
            tl.store(ok, (wrong == 0) & (in_total <= in_capacity) & (out_total <= out_capacity))

    i_each = tl.arange(0, BLOCK_M)[None, :]
    o_count = i_sample[:, None] * MODALITIES + i_each
    m_count = m_sample[:, None] & (i_each < MODALITIES)
    b_in = tl.load(in_counts + o_count, mask=m_count, other=0)
    b_out = tl.load(out_counts + o_count, mask=m_count, other=0)
    b_in_start += tl.sum(tl.where(i_each < i_modality, b_in, 0), 1)
    b_out_start += tl.sum(tl.where(i_each < i_modality, b_out, 0), 1)
    b_in_count = tl.sum(tl.where(i_each == i_modality, b_in, 0), 1)
    b_out_count = tl.sum(tl.where(i_each == i_modality, b_out, 0), 1)

    b_available = tl.load(layout + 2 * MODALITIES + i_modality) + tl.zeros((BLOCK_S,), tl.int32)
    if lengths is not None:
        b_length = tl.load(lengths + i_sample * lengths_b + i_modality * lengths_m, mask=m_sample, other=0)
        b_available = tl.minimum(tl.maximum(b_length.to(tl.int64), 0), b_available).to(tl.int32)
    b_id = tl.load(sample_ids + i_sample * ids_b, mask=m_sample, other=0)[:, None]
    i_quad = tl.arange(0, BLOCK_N // 4)[None, :]
    b_w0, b_w1, b_w2, b_w3 = _philox(seed_low, seed_high, epoch, b_id, _counter(POSITIONS, i_modality, i_quad))
    b_key = tl.interleave(
        tl.interleave(b_w0, b_w2), tl.interleave(b_w1, b_w3)
    )  # position j has word j & 3 of block j >> 2

    i_position = tl.arange(0, BLOCK_N)[None, :]
    m_position = m_sample[:, None] & (i_position < b_available[:, None])
    m_input, m_target = _chosen(b_key, m_position, b_in_count, b_out_count)
    b_flag = m_input.to(tl.int32) + (m_target.to(tl.int32) << 16)
    b_rank = tl.cumsum(b_flag, 1) - b_flag  # among the chosen of its kind
    o_token = (tl.load(layout + 3 * MODALITIES + i_modality) + i_position).to(tl.int64) * tokens_l
    p_token = tokens + i_sample[:, None] * tokens_b + o_token
    b_token = tl.load(p_token, mask=m_input | m_target, other=0).to(tl.int64)
    i_position = i_position.to(tl.int64) + tl.zeros_like(b_token)
    b_modality = i_modality.to(tl.int64) + tl.zeros_like(b_token)
    o_in, o_out = b_in_start[:, None] + (b_rank & 0xFFFF), b_out_start[:, None] + (b_rank >> 16)
    _write(in_ids, in_positions, in_modalities, o_in, in_capacity, m_input, b_token, i_position, b_modality)
    _write(out_ids, out_positions, out_modalities, o_out, out_capacity, m_target, b_token, i_position, b_modality)

    i_program, programs = i_tile * MODALITIES + i_modality, tl.num_programs(0) * MODALITIES
    _write_tail(in_ids, in_positions, in_modalities, in_total, in_capacity, i_program, programs, 0)
    _write_tail(out_ids, out_positions, out_modalities, out_total, out_capacity, i_program, programs, TARGET_FILL)
