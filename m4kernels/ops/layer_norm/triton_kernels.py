"""Triton kernels of layer_norm: a row at a time in registers, read once and written once.

A row is two blocks, its largest power of two of columns (HEAD) and the rest (TAIL columns, masked; 0 for none), so that
little is loaded in vain: 640 columns are 512 + 128. Up to 768 columns a program is one warp, whose sums need no
barrier. All arithmetic is in float32.
"""

import triton
import triton.language as tl

from m4kernels._triton_kernels import rounded


@triton.jit
def _load_total(x, update, total, o_row, m_row):
    """x + update as float32, written to `total` and rounded as there; x alone where there is no update."""
    b_total = tl.load(x + o_row, mask=m_row, other=0.0).to(tl.float32)
    if update is not None:
        b_total += tl.load(update + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_stored = rounded(b_total, total.dtype.element_ty)
        tl.store(total + o_row, b_stored, mask=m_row)
        b_total = b_stored.to(tl.float32)
    return b_total


@triton.jit
def norm_forward_kernel(
    x,  # (T, D)
    update,  # (T, D), or None
    weight,  # (D,)
    normed,  # (T, D), written
    total,  # (T, D), written: x + update; None without
    mean,  # (T,) float32, written
    rstd,  # (T,) float32, written: 1 / standard deviation
    tokens,
    eps,
    ROWS: tl.constexpr,  # of a program
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    o_head = tl.arange(0, HEAD)
    m_head = o_head < DIM  # all are
    b_weight = tl.load(weight + o_head).to(tl.float32)
    if TAIL:
        o_tail = HEAD + tl.arange(0, TAIL)
        m_tail = o_tail < DIM
        b_weight_tail = tl.load(weight + o_tail, mask=m_tail, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    for i in range(0, tl.minimum(ROWS, tokens - first)):
        i_row = first + i
        i_begin = i_row.to(tl.int64) * DIM
        b_x = _load_total(x, update, total, i_begin + o_head, m_head)
        row_sum = tl.sum(b_x, 0)
        if TAIL:
            b_x_tail = _load_total(x, update, total, i_begin + o_tail, m_tail)
            row_sum += tl.sum(b_x_tail, 0)
        row_mean = row_sum / DIM
        b_x -= row_mean
        squares = tl.sum(b_x * b_x, 0)
        if TAIL:
            b_x_tail = tl.where(m_tail, b_x_tail - row_mean, 0.0)
            squares += tl.sum(b_x_tail * b_x_tail, 0)
        row_rstd = tl.rsqrt(squares / DIM + eps)
        tl.store(mean + i_row, row_mean)
        tl.store(rstd + i_row, row_rstd)
        dtype = normed.dtype.element_ty
        tl.store(normed + i_begin + o_head, rounded(b_x * row_rstd * b_weight, dtype))
        if TAIL:
            tl.store(normed + i_begin + o_tail, rounded(b_x_tail * row_rstd * b_weight_tail, dtype), mask=m_tail)


@triton.jit
def _store_gradient(dx, dupdate, o_row, b_dx, m_row):
    if dx is not None:
        tl.store(dx + o_row, rounded(b_dx, dx.dtype.element_ty), mask=m_row)
    if dupdate is not None:
        tl.store(dupdate + o_row, rounded(b_dx, dupdate.dtype.element_ty), mask=m_row)


@triton.jit
def _load_gradient(grad_total, o_row, m_row, b_zero):
    b_grad = b_zero
    if grad_total is not None:
        b_grad = tl.load(grad_total + o_row, mask=m_row, other=0.0).to(tl.float32)
    return b_grad


@triton.jit(do_not_specialize=("tokens", "rows"))
def norm_backward_kernel(
    grad,  # (T, D), of the normed rows
    grad_total,  # (T, D), of x + update from elsewhere, or None
    total,  # (T, D), x + update
    weight,  # (D,)
    mean,  # (T,) float32
    rstd,  # (T,) float32
    dx,  # (T, D), written; or None
    dupdate,  # (T, D), written: the same rounded to its dtype; or None
    partial,  # (programs, D) float32, written: the program's share of d weight; or None
    tokens,
    rows,  # of a program
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    o_head = tl.arange(0, HEAD)
    m_head = o_head < DIM  # all are
    b_weight = tl.load(weight + o_head).to(tl.float32)
    b_zero = tl.zeros([HEAD], tl.float32)
    b_share = tl.zeros([HEAD], tl.float32)
    if TAIL:
        o_tail = HEAD + tl.arange(0, TAIL)
        m_tail = o_tail < DIM
        b_weight_tail = tl.load(weight + o_tail, mask=m_tail, other=0.0).to(tl.float32)
        b_zero_tail = tl.zeros([TAIL], tl.float32)
        b_share_tail = tl.zeros([TAIL], tl.float32)
    i_program = tl.program_id(0)
    first = i_program * rows
    for i in range(0, tl.minimum(rows, tokens - first)):
        i_row = first + i
        i_begin = i_row.to(tl.int64) * DIM
        row_mean = tl.load(mean + i_row)
        row_rstd = tl.load(rstd + i_row)
        b_grad = tl.load(grad + i_begin + o_head).to(tl.float32)
        b_x = (tl.load(total + i_begin + o_head).to(tl.float32) - row_mean) * row_rstd
        b_pass = _load_gradient(grad_total, i_begin + o_head, m_head, b_zero)
        b_share += b_grad * b_x
        b_grad *= b_weight
        along, sum_grad = tl.sum(b_grad * b_x, 0), tl.sum(b_grad, 0)
        if TAIL:
            b_grad_tail = tl.load(grad + i_begin + o_tail, mask=m_tail, other=0.0).to(tl.float32)
            b_x_tail = tl.load(total + i_begin + o_tail, mask=m_tail, other=0.0).to(tl.float32)
            b_x_tail = (b_x_tail - row_mean) * row_rstd
            b_pass_tail = _load_gradient(grad_total, i_begin + o_tail, m_tail, b_zero_tail)
            b_share_tail += b_grad_tail * b_x_tail
            b_grad_tail *= b_weight_tail
            along += tl.sum(b_grad_tail * b_x_tail, 0)
            sum_grad += tl.sum(b_grad_tail, 0)
        along = along / DIM
        sum_grad = sum_grad / DIM
        b_dx = (b_grad - sum_grad - b_x * along) * row_rstd + b_pass
        _store_gradient(dx, dupdate, i_begin + o_head, b_dx, m_head)
        if TAIL:
            b_dx_tail = (b_grad_tail - sum_grad - b_x_tail * along) * row_rstd + b_pass_tail
            _store_gradient(dx, dupdate, i_begin + o_tail, b_dx_tail, m_tail)
    if partial is not None:
        p_share = partial + i_program.to(tl.int64) * DIM
        tl.store(p_share + o_head, b_share)
        if TAIL:
            tl.store(p_share + o_tail, b_share_tail, mask=m_tail)


@triton.jit(do_not_specialize=("programs",))
def norm_sum_kernel(
    partial,  # (programs, D) float32
    dweight,  # (D,), written: their sum, in a fixed order
    programs,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    o_column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    o_row = tl.arange(0, BLOCK_ROWS)
    m_column = o_column < DIM
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, programs, BLOCK_ROWS):
        o_partial = (start + o_row)[:, None].to(tl.int64) * DIM + o_column[None, :]
        b_sum += tl.load(partial + o_partial, mask=(start + o_row < programs)[:, None] & m_column[None, :], other=0.0)
    tl.store(dweight + o_column, rounded(tl.sum(b_sum, 0), dweight.dtype.element_ty), mask=m_column)
