"""Triton kernels of linear_cross_entropy: everything between the library's matrix products.

A program has one row: the logits of one token, at `logits + i_row * pitch`. `target` is -1 and `limit` 0 for an ignored
token. Classes at or beyond `limit` count for nothing, whatever lies there, and their gradient is written as 0, as the
matrix products run over the whole width. A row's memory is `pitch` wide, and read and written to its end. Logits and
their gradients are in the operands' dtype, all arithmetic is in float32.
"""

import triton
import triton.language as tl

from m4kernels._triton_kernels import rounded


@triton.jit
def prepare_kernel(
    targets,  # (T,) int64
    limits,  # (T,) integer, or None: all classes
    weights,  # (T,) floating, or None: 1 / number of valid tokens
    target,  # (T,) int32, written: -1 where ignored
    limit,  # (T,) int32, written: 0 where ignored
    scale,  # (T,) float32, written: the token's factor in the loss, 0 where ignored
    boost,  # (2,) float32, written: factor of the logits' gradients, and its inverse
    right,  # () bool, written: no token's target is outside [0, limit), and no limit above `classes`
    tokens,
    classes,
    ignore_index,
    stride_targets,
    stride_limits,
    stride_weights,
    BOOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program. With BOOST the factor is the power of two that takes the largest scale to 2^13 … 2^14: in float16
    the gradient of a mean over thousands of tokens would vanish otherwise. Without, it is 1."""
    o_lane = tl.arange(0, BLOCK)
    b_count = tl.zeros([BLOCK], tl.int32)
    b_largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        i_token = (start + o_lane).to(tl.int64)
        m_valid = tl.load(targets + i_token * stride_targets, mask=i_token < tokens, other=ignore_index) != ignore_index
        b_count += m_valid.to(tl.int32)
        if weights is not None:
            b_size = tl.abs(tl.load(weights + i_token * stride_weights, mask=m_valid, other=0).to(tl.float32))
            b_largest = tl.maximum(b_largest, tl.where(b_size < float("inf"), b_size, 0))
    mean = 1.0 / tl.maximum(tl.sum(b_count, 0), 1).to(tl.float32)
    if BOOST:
        top = mean
        if weights is not None:
            top = tl.max(b_largest, 0)
        # With exponents as float32 stores them, 127 beyond the true one.
        exponent = tl.minimum(tl.maximum(127 + 13 + 127 - (top.to(tl.int32, bitcast=True) >> 23), 1), 253)
        tl.store(boost, (exponent << 23).to(tl.float32, bitcast=True))
        tl.store(boost + 1, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
    else:
        tl.store(boost, 1.0)
        tl.store(boost + 1, 1.0)
    b_wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tokens, BLOCK):
        i_token = (start + o_lane).to(tl.int64)
        b_target = tl.load(targets + i_token * stride_targets, mask=i_token < tokens, other=ignore_index)
        m_valid = b_target != ignore_index
        # In 32 bits from here on; what is out of range stays so.
        b_token = tl.minimum(tl.maximum(b_target, -1), classes).to(tl.int32)
        b_limit = tl.zeros([BLOCK], tl.int32) + classes
        b_scale = tl.zeros([BLOCK], tl.float32) + mean
        if limits is not None:
            b_given = tl.load(limits + i_token * stride_limits, mask=m_valid, other=0)
            b_limit = tl.minimum(tl.maximum(b_given, 0), classes + 1).to(tl.int32)
        b_wrong |= (m_valid & ((b_token < 0) | (b_token >= b_limit) | (b_limit > classes))).to(tl.int32)
        if weights is not None:
            b_scale = tl.load(weights + i_token * stride_weights, mask=m_valid, other=0).to(tl.float32)
        tl.store(target + i_token, tl.where(m_valid, b_token, -1), mask=i_token < tokens)
        tl.store(limit + i_token, tl.where(m_valid, b_limit, 0), mask=i_token < tokens)
        tl.store(scale + i_token, tl.where(m_valid, b_scale, 0), mask=i_token < tokens)
    tl.store(right, tl.sum(b_wrong, 0) == 0)


@triton.jit
def gather_kernel(
    x,  # (T, D), any strides
    target,  # (T,) int32
    out,  # (rows, D), written
    first,
    dim,
    stride_x,
    stride_x_dim,
    BLOCK: tl.constexpr,
):
    """Tokens first, first + 1, … of x in the operands' dtype; 0 where ignored, whatever x holds there."""
    i_row = tl.program_id(0).to(tl.int64)
    m_valid = tl.load(target + first + i_row) >= 0
    for start in range(0, dim, BLOCK):
        o_column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        o_x = (first + i_row) * stride_x + o_column * stride_x_dim
        b_value = tl.load(x + o_x, mask=(o_column < dim) & m_valid, other=0).to(tl.float32)
        tl.store(out + i_row * dim + o_column, rounded(b_value, out.dtype.element_ty), mask=o_column < dim)


@triton.jit
def _sweep(p_row, i_class, limit, width, pitch, top, total, best, BLOCK: tl.constexpr):
    """(maximum, Σ exp(z - maximum), first class of the maximum) after the classes i_class … i_class + width too.

    A running maximum and sum of every 16 bytes' place in a block, which a thread holds alone: nothing is exchanged
    between threads before the end.
    """
    end = tl.minimum(limit - i_class, width)
    WIDE: tl.constexpr = 128 // p_row.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // WIDE
    b_top = tl.full([LANES], -float("inf"), tl.float32)
    b_total = tl.zeros([LANES], tl.float32)
    b_best = tl.zeros([LANES], tl.int32)
    for start in range(0, end, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        # The row's end in memory bounds the load: a multiple of 16, as the compiler knows; the limit is any number.
        b_z = tl.load(p_row + o_column, mask=o_column < pitch, other=-float("inf")).to(tl.float32)
        b_z = tl.reshape(tl.where(o_column < end, b_z, -float("inf")), (LANES, WIDE))
        b_column = tl.reshape(o_column, (LANES, WIDE))
        b_new = tl.max(b_z, 1)
        m_better = b_new > b_top
        b_first = tl.min(tl.where(b_z == b_new[:, None], b_column, width), 1)
        b_best = tl.where(m_better, b_first, b_best)
        b_new = tl.where(m_better, b_new, b_top)
        b_shift = tl.where(b_new == -float("inf"), 0, b_new)  # -inf - -inf is NaN
        b_total = b_total * tl.exp(b_top - b_shift) + tl.sum(tl.exp(b_z - b_shift[:, None]), 1)
        b_top = b_new
    new = tl.max(b_top, 0)
    if new > top:
        best = i_class + tl.min(tl.where(b_top == new, b_best, width), 0)
    new = tl.maximum(top, new)
    shift = tl.where(new == -float("inf"), 0, new)
    return new, total * tl.exp(top - shift) + tl.sum(b_total * tl.exp(b_top - shift), 0), best


@triton.jit
def _write_gradient(p_row, i_class, limit, target, width, pitch, top, total, factor, BLOCK: tl.constexpr):
    """The row's logits become factor · (softmax - onehot), and 0 to the end of the row."""
    end = tl.maximum(tl.minimum(limit - i_class, width), 0)
    inverse = 1.0 / tl.where(target >= 0, total, 1)
    shift = tl.where(top == -float("inf"), 0, top)
    for start in range(0, end, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        m_row = o_column < pitch  # as in _sweep
        b_z = tl.load(p_row + o_column, mask=m_row, other=-float("inf")).to(tl.float32)
        b_gradient = tl.exp(b_z - shift) * inverse
        b_gradient = tl.where(o_column + i_class == target, b_gradient - 1.0, b_gradient) * factor
        b_gradient = tl.where(o_column < end, b_gradient, 0)  # 0 beyond the limit even where the row is NaN
        tl.store(p_row + o_column, rounded(b_gradient, p_row.dtype.element_ty), mask=m_row)
    for start in range(tl.cdiv(end, BLOCK) * BLOCK, pitch, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        tl.store(p_row + o_column, tl.zeros([BLOCK], p_row.dtype.element_ty), mask=o_column < pitch)


@triton.jit
def _write_loss(i_token, target, scale, top, total, best, target_logit, nll, term, correct):
    b_nll = tl.where(target >= 0, tl.log(tl.where(target >= 0, total, 1)) - (target_logit - top), 0)
    tl.store(nll + i_token, b_nll)
    tl.store(term + i_token, tl.where(target >= 0, scale * b_nll, 0))
    tl.store(correct + i_token, (target >= 0) & (best == target) & (b_nll == b_nll))


@triton.jit
def whole_rows_kernel(
    logits,  # (rows, V) with a row every `pitch`; with GRADIENT overwritten by their gradient
    target,  # (T,) int32
    limit,  # (T,) int32
    scale,  # (T,) float32
    boost,  # (2,) float32
    nll,  # (T,) float32, written
    term,  # (T,) float32, written: scale · nll
    correct,  # (T,) bool, written
    first,
    width,
    pitch,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and, in place, gradient of the rows of tokens first, first + 1, …"""
    i_row = tl.program_id(0).to(tl.int64)
    i_token = first + i_row
    p_row = logits + i_row * pitch
    i_target = tl.load(target + i_token)
    i_limit = tl.load(limit + i_token)
    b_scale = tl.load(scale + i_token)
    target_logit = tl.load(p_row + i_target, mask=(i_target >= 0) & (i_target < width), other=0).to(tl.float32)
    top, total = tl.full((), -float("inf"), tl.float32), tl.full((), 0, tl.float32)
    top, total, best = _sweep(p_row, 0, i_limit, width, pitch, top, total, tl.full((), -1, tl.int32), BLOCK)
    _write_loss(i_token, i_target, b_scale, top, total, best, target_logit, nll, term, correct)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        factor = b_scale * tl.load(boost)
        _write_gradient(p_row, 0, i_limit, i_target, width, pitch, top, total, factor, BLOCK)


@triton.jit
def sweep_kernel(
    logits,  # (rows, width) with a row every `pitch`: classes i_class … i_class + width
    target,  # (T,) int32
    limit,  # (T,) int32
    scale,  # (T,) float32
    state,  # (3, rows) float32, updated: maximum, Σ exp(z - maximum), the target's logit
    best,  # (rows,) int32, updated: first class of the maximum
    nll,  # (T,) float32, written with the last classes
    term,  # (T,) float32, written with the last classes
    correct,  # (T,) bool, written with the last classes
    first,
    rows,
    i_class,
    width,
    classes,
    pitch,
    BLOCK: tl.constexpr,
):
    """Takes some classes of tokens first, first + 1, … into their running softmax, from class 0 on."""
    i_row = tl.program_id(0).to(tl.int64)
    i_token = first + i_row
    p_row = logits + i_row * pitch
    i_target = tl.load(target + i_token)
    i_limit = tl.load(limit + i_token)
    later = i_class > 0
    top = tl.load(state + i_row, mask=later, other=-float("inf"))
    total = tl.load(state + rows + i_row, mask=later, other=0.0)
    target_logit = tl.load(state + 2 * rows + i_row, mask=later, other=0.0)
    i_best = tl.load(best + i_row, mask=later, other=-1)
    here = (i_target >= i_class) & (i_target < i_class + width)
    target_logit = tl.where(
        here, tl.load(p_row + (i_target - i_class), mask=here, other=0).to(tl.float32), target_logit
    )
    top, total, i_best = _sweep(p_row, i_class, i_limit, width, pitch, top, total, i_best, BLOCK)
    tl.store(state + i_row, top)
    tl.store(state + rows + i_row, total)
    tl.store(state + 2 * rows + i_row, target_logit)
    tl.store(best + i_row, i_best)
    if i_class + width >= classes:
        b_scale = tl.load(scale + i_token)
        _write_loss(i_token, i_target, b_scale, top, total, i_best, target_logit, nll, term, correct)


@triton.jit
def gradient_kernel(
    logits,  # (rows, width) with a row every `pitch`, overwritten by their gradient
    target,  # (T,) int32
    limit,  # (T,) int32
    scale,  # (T,) float32
    boost,  # (2,) float32
    state,  # (3, rows) float32, as sweep_kernel leaves it after all classes
    first,
    rows,
    i_class,
    width,
    pitch,
    BLOCK: tl.constexpr,
):
    """In place, the gradient of classes i_class … i_class + width of tokens first, first + 1, …"""
    i_row = tl.program_id(0).to(tl.int64)
    i_token = first + i_row
    i_target = tl.load(target + i_token)
    i_limit = tl.load(limit + i_token)
    factor = tl.load(scale + i_token) * tl.load(boost)
    top = tl.load(state + i_row)
    total = tl.load(state + rows + i_row)
    _write_gradient(logits + i_row * pitch, i_class, i_limit, i_target, width, pitch, top, total, factor, BLOCK)


@triton.jit
def finish_rows_kernel(
    dx,  # (T, D) float32, updated
    target,  # (T,) int32
    boost,  # (2,) float32
    dim,
    BOOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of ignored tokens become 0 (0 · weight is NaN where the weight is not finite), others lose the boost."""
    i_token = tl.program_id(0).to(tl.int64)
    valid = tl.load(target + i_token) >= 0
    if BOOST:
        inverse = tl.load(boost + 1)
        for start in range(0, dim, BLOCK):
            o_column = start + tl.arange(0, BLOCK)
            b_value = tl.load(dx + i_token * dim + o_column, mask=(o_column < dim) & valid, other=0)
            tl.store(dx + i_token * dim + o_column, b_value * inverse, mask=o_column < dim)
    else:
        for start in range(0, dim, BLOCK):
            o_column = start + tl.arange(0, BLOCK)
            tl.store(dx + i_token * dim + o_column, tl.zeros([BLOCK], tl.float32), mask=(o_column < dim) & (valid == 0))


@triton.jit
def scale_kernel(
    values,  # (N,) float32, updated
    factor,  # () floating
    count,
    BLOCK: tl.constexpr,
):
    """values *= factor; where the factor is 1, as in most training steps, the values are not even read."""
    b_factor = tl.load(factor).to(tl.float32)
    if b_factor != 1.0:
        o_value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(values + o_value, tl.load(values + o_value, mask=o_value < count) * b_factor, mask=o_value < count)
