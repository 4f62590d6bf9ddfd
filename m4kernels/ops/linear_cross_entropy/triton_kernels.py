"""Triton kernels of linear_cross_entropy: everything between the library's matrix products.

A program has one row: the logits of one token, at `logits_p + row * pitch`. `target` is -1 and `limit` 0 for an ignored
token; classes at or beyond `limit` are not read, and their gradient is written as 0, since the matrix products run over
the whole width. Logits and their gradients are in the operands' dtype, all arithmetic is in float32.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest even.
CUTS_OFF = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    if CUTS_OFF and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def prepare_kernel(
    targets_p,  # (T,) int64
    limits_p,  # (T,) integer, or None: all classes
    weights_p,  # (T,) floating, or None: 1 / number of valid tokens
    target_p,  # (T,) int32, written: -1 where ignored
    limit_p,  # (T,) int32, written: 0 where ignored
    scale_p,  # (T,) float32, written: the token's factor in the loss, 0 where ignored
    boost_p,  # (2,) float32, written: factor of the logits' gradients, and its inverse
    tokens,
    classes,
    ignore_index,
    targets_step,
    limits_step,
    weights_step,
    BOOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program. With BOOST the factor is the power of two that takes the largest scale to 2^13 … 2^14: in float16
    the gradient of a mean over thousands of tokens would vanish otherwise. Without, it is 1."""
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        i = (start + lanes).to(tl.int64)
        valid = tl.load(targets_p + i * targets_step, mask=i < tokens, other=ignore_index) != ignore_index
        count += valid.to(tl.int32)
        if weights_p is not None:
            size = tl.abs(tl.load(weights_p + i * weights_step, mask=valid, other=0).to(tl.float32))
            largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0))
    mean = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    if BOOST:
        top = mean
        if weights_p is not None:
            top = tl.max(largest, 0)
        # With exponents as float32 stores them, 127 beyond the true one.
        exponent = tl.minimum(tl.maximum(127 + 13 + 127 - (top.to(tl.int32, bitcast=True) >> 23), 1), 253)
        tl.store(boost_p, (exponent << 23).to(tl.float32, bitcast=True))
        tl.store(boost_p + 1, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
    else:
        tl.store(boost_p, 1.0)
        tl.store(boost_p + 1, 1.0)
    for start in range(0, tokens, BLOCK):
        i = (start + lanes).to(tl.int64)
        target = tl.load(targets_p + i * targets_step, mask=i < tokens, other=ignore_index)
        valid = target != ignore_index
        limit = tl.zeros([BLOCK], tl.int32) + classes
        scale = tl.zeros([BLOCK], tl.float32) + mean
        if limits_p is not None:
            limit = tl.load(limits_p + i * limits_step, mask=valid, other=0).to(tl.int32)
        if weights_p is not None:
            scale = tl.load(weights_p + i * weights_step, mask=valid, other=0).to(tl.float32)
        tl.store(target_p + i, tl.where(valid, target, -1).to(tl.int32), mask=i < tokens)
        tl.store(limit_p + i, tl.where(valid, limit, 0), mask=i < tokens)
        tl.store(scale_p + i, tl.where(valid, scale, 0), mask=i < tokens)


@triton.jit
def gather_kernel(
    x_p,  # (T, D), any strides
    target_p,  # (T,) int32
    out_p,  # (rows, D), written
    first,
    dim,
    row_step,
    column_step,
    BLOCK: tl.constexpr,
):
    """Tokens first, first + 1, … of x in the operands' dtype; 0 where ignored, whatever x holds there."""
    row = tl.program_id(0).to(tl.int64)
    valid = tl.load(target_p + first + row) >= 0
    for start in range(0, dim, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        offset = (first + row) * row_step + column * column_step
        value = tl.load(x_p + offset, mask=(column < dim) & valid, other=0).to(tl.float32)
        tl.store(out_p + row * dim + column, _rounded(value, out_p.dtype.element_ty), mask=column < dim)


@triton.jit
def _sweep(row_p, offset, limit, width, top, total, best, BLOCK: tl.constexpr):
    """(maximum, Σ exp(z - maximum), first class of the maximum) after the classes offset … offset + width too."""
    end = tl.minimum(limit - offset, width)
    lanes = tl.arange(0, BLOCK)
    totals = tl.where(lanes == 0, total, 0.0)  # a lane each, so that only the maximum is reduced within the loop
    for start in range(0, end, BLOCK):
        column = start + lanes
        z = tl.load(row_p + column, mask=column < end, other=-float("inf")).to(tl.float32)
        block_top = tl.max(z, 0)
        if block_top > top:
            best = offset + tl.min(tl.where(z == block_top, column, width), 0)
            totals *= tl.exp(top - block_top)
            top = block_top
        totals += tl.exp(z - tl.where(top == -float("inf"), 0, top))  # -inf - -inf is NaN
    return top, tl.sum(totals, 0), best


@triton.jit
def _write_gradient(row_p, offset, limit, target, width, top, total, factor, BLOCK: tl.constexpr):
    """The row's logits become factor · (softmax - onehot)."""
    end = tl.maximum(tl.minimum(limit - offset, width), 0)
    inverse = 1.0 / tl.where(target >= 0, total, 1)
    shift = tl.where(top == -float("inf"), 0, top)
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_p + column, mask=column < end, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(z - shift) * inverse
        gradient = tl.where(column + offset == target, gradient - 1.0, gradient) * factor
        gradient = tl.where(column < end, gradient, 0)  # 0 beyond the limit even where the row is NaN
        tl.store(row_p + column, _rounded(gradient, row_p.dtype.element_ty), mask=column < width)
    for start in range(tl.cdiv(end, BLOCK) * BLOCK, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(row_p + column, tl.zeros([BLOCK], row_p.dtype.element_ty), mask=column < width)


@triton.jit
def _write_loss(token, target, scale, top, total, best, target_logit, nll_p, term_p, correct_p):
    nll = tl.where(target >= 0, tl.log(tl.where(target >= 0, total, 1)) - (target_logit - top), 0)
    tl.store(nll_p + token, nll)
    tl.store(term_p + token, tl.where(target >= 0, scale * nll, 0))
    tl.store(correct_p + token, (target >= 0) & (best == target) & (nll == nll))


@triton.jit
def whole_rows_kernel(
    logits_p,  # (rows, V) with a row every `pitch`; with GRADIENT overwritten by their gradient
    target_p,  # (T,) int32
    limit_p,  # (T,) int32
    scale_p,  # (T,) float32
    boost_p,  # (2,) float32
    nll_p,  # (T,) float32, written
    term_p,  # (T,) float32, written: scale · nll
    correct_p,  # (T,) bool, written
    first,
    width,
    pitch,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and, in place, gradient of the rows of tokens first, first + 1, …"""
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    row_p = logits_p + row * pitch
    target = tl.load(target_p + token)
    limit = tl.load(limit_p + token)
    scale = tl.load(scale_p + token)
    target_logit = tl.load(row_p + target, mask=(target >= 0) & (target < width), other=0).to(tl.float32)
    top, total = tl.full((), -float("inf"), tl.float32), tl.full((), 0, tl.float32)
    top, total, best = _sweep(row_p, 0, limit, width, top, total, tl.full((), -1, tl.int32), BLOCK)
    _write_loss(token, target, scale, top, total, best, target_logit, nll_p, term_p, correct_p)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        factor = scale * tl.load(boost_p)
        _write_gradient(row_p, 0, limit, target, width, top, total, factor, BLOCK)


@triton.jit
def sweep_kernel(
    logits_p,  # (rows, width) with a row every `pitch`: classes offset … offset + width
    target_p,  # (T,) int32
    limit_p,  # (T,) int32
    scale_p,  # (T,) float32
    state_p,  # (3, rows) float32, updated: maximum, Σ exp(z - maximum), the target's logit
    best_p,  # (rows,) int32, updated: first class of the maximum
    nll_p,  # (T,) float32, written with the last classes
    term_p,  # (T,) float32, written with the last classes
    correct_p,  # (T,) bool, written with the last classes
    first,
    rows,
    offset,
    width,
    classes,
    pitch,
    BLOCK: tl.constexpr,
):
    """Takes some classes of tokens first, first + 1, … into their running softmax, from offset 0 on."""
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    row_p = logits_p + row * pitch
    target = tl.load(target_p + token)
    limit = tl.load(limit_p + token)
    later = offset > 0
    top = tl.load(state_p + row, mask=later, other=-float("inf"))
    total = tl.load(state_p + rows + row, mask=later, other=0.0)
    target_logit = tl.load(state_p + 2 * rows + row, mask=later, other=0.0)
    best = tl.load(best_p + row, mask=later, other=-1)
    here = (target >= offset) & (target < offset + width)
    target_logit = tl.where(here, tl.load(row_p + (target - offset), mask=here, other=0).to(tl.float32), target_logit)
    top, total, best = _sweep(row_p, offset, limit, width, top, total, best, BLOCK)
    tl.store(state_p + row, top)
    tl.store(state_p + rows + row, total)
    tl.store(state_p + 2 * rows + row, target_logit)
    tl.store(best_p + row, best)
    if offset + width >= classes:
        scale = tl.load(scale_p + token)
        _write_loss(token, target, scale, top, total, best, target_logit, nll_p, term_p, correct_p)


@triton.jit
def gradient_kernel(
    logits_p,  # (rows, width) with a row every `pitch`, overwritten by their gradient
    target_p,  # (T,) int32
    limit_p,  # (T,) int32
    scale_p,  # (T,) float32
    boost_p,  # (2,) float32
    state_p,  # (3, rows) float32, as sweep_kernel leaves it after all classes
    first,
    rows,
    offset,
    width,
    pitch,
    BLOCK: tl.constexpr,
):
    """In place, the gradient of classes offset … offset + width of tokens first, first + 1, …"""
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    target = tl.load(target_p + token)
    limit = tl.load(limit_p + token)
    factor = tl.load(scale_p + token) * tl.load(boost_p)
    top = tl.load(state_p + row)
    total = tl.load(state_p + rows + row)
    _write_gradient(logits_p + row * pitch, offset, limit, target, width, top, total, factor, BLOCK)


@triton.jit
def finish_rows_kernel(
    dx_p,  # (T, D) float32, updated
    target_p,  # (T,) int32
    boost_p,  # (2,) float32
    dim,
    BOOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of ignored tokens become 0 (0 · weight is NaN where the weight is not finite), others lose the boost."""
    token = tl.program_id(0).to(tl.int64)
    valid = tl.load(target_p + token) >= 0
    if BOOST:
        inverse = tl.load(boost_p + 1)
        for start in range(0, dim, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(dx_p + token * dim + column, mask=(column < dim) & valid, other=0)
            tl.store(dx_p + token * dim + column, value * inverse, mask=column < dim)
    else:
        for start in range(0, dim, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(dx_p + token * dim + column, tl.zeros([BLOCK], tl.float32), mask=(column < dim) & (valid == 0))


@triton.jit
def scale_kernel(
    values_p,  # (N,) float32, updated
    factor_p,  # () floating
    count,
    BLOCK: tl.constexpr,
):
    """values *= factor; where the factor is 1, as in most training steps, the values are not even read."""
    factor = tl.load(factor_p).to(tl.float32)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(values_p + i, tl.load(values_p + i, mask=i < count) * factor, mask=i < count)
