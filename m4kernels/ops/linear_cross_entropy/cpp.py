"""linear_cross_entropy on the CPU: the library's matrix products over chunks of tokens, and csrc/linear_cross_entropy
between them.

Only valid tokens are multiplied, and a chunk only with the classes that its tokens can be of: tokens are ordered by
their vocabulary limit, widest first.
"""

import torch
from torch import Tensor

from m4kernels import _ext
from m4kernels.dispatch import runs_always
from m4kernels.ops.linear_cross_entropy.arguments import LossArguments

# Rows of a chunk: from 512 on the matrix products run at full speed, and fresh memory for more logits costs time (two
# AVX-512 cores; see benchmarks/NOTES.md). With few classes more rows, up to 16 MiB of logits, which caches still hold.
MAX_ROWS = 512
FEW_LOGITS = 2**22


can_run = runs_always


def linear_cross_entropy(call: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_cross_entropy."""
    extension, dtype, threads = _ext.require(), call.result_dtype, torch.get_num_threads()
    double = dtype == torch.float64
    tokens, dim = call.x.shape
    classes = call.weight.shape[0]
    targets = call.targets.contiguous()
    vocab_limit = None if call.vocab_limit is None else call.vocab_limit.contiguous()
    token_weight = None if call.token_weight is None else call.token_weight.to(dtype).contiguous()
    order, limit = torch.empty((2, tokens), dtype=torch.int64)
    scale = torch.empty(tokens, dtype=dtype)
    order_p, limit_p, scale_p, targets_p = order.data_ptr(), limit.data_ptr(), scale.data_ptr(), targets.data_ptr()
    count = (extension.lce_order_f64 if double else extension.lce_order_f32)(
        targets_p,
        0 if vocab_limit is None else vocab_limit.data_ptr(),
        0 if vocab_limit is None else vocab_limit.itemsize,
        0 if token_weight is None else token_weight.data_ptr(),
        tokens,
        classes,
        call.ignore_index,
        order_p,
        limit_p,
        scale_p,
    )
    if count < 0:
        raise call.value_error(-1 - count)

    everything = count == tokens and (vocab_limit is None or bool((order.diff() == 1).all()))
    new = torch.empty if count == tokens else torch.zeros
    nll = new(tokens, dtype=dtype)
    correct = new(tokens, dtype=torch.bool)
    dx = new((tokens, dim) if call.x_grad else 0, dtype=dtype)
    dweight = torch.empty((classes, dim) if call.weight_grad else 0, dtype=dtype)

    convert_x = not (everything and call.x.dtype == call.operand_dtype == dtype and call.x.is_contiguous())
    copy_dx = call.x_grad and not everything
    # A row: its logits, x gathered and converted (beside the previous chunk's), its gradient.
    per_row_aside = dim * dtype.itemsize * (4 * convert_x + 2 * copy_dx)
    room, block = call.divide_workspace(tokens * (32 + 2 * dtype.itemsize), classes * dtype.itemsize + per_row_aside)
    nll_p, correct_p = nll.data_ptr(), correct.data_ptr()
    run_pass = extension.lce_pass_f64 if double else extension.lce_pass_f32
    gradient = call.x_grad or call.weight_grad
    max_rows = max(MAX_ROWS, FEW_LOGITS // classes)
    chunks = extension.lce_plan(limit_p, count, room, dtype.itemsize, per_row_aside, max_rows)
    workspace = torch.empty(max((rows * width for _, rows, width in chunks), default=0), dtype=dtype)
    written = 0  # classes of dweight that hold a value
    for first, rows, width in chunks:
        members = slice(first, first + rows)
        if everything:
            x = call.x if rows == tokens else call.x[members]
        else:
            x = call.x.index_select(0, order[members])
        if convert_x:
            x = x.to(call.operand_dtype).to(dtype).contiguous()
        logits = torch.as_strided(workspace, (rows, width), (width, 1))
        for part, weight in call.weight_blocks(block, width):
            torch.mm(x, weight.T, out=logits[:, part])
        run_pass(
            logits.data_ptr(),
            order_p,
            limit_p,
            scale_p,
            targets_p,
            nll_p,
            correct_p,
            first,
            rows,
            width,
            gradient,
            threads,
        )
        if not gradient:
            continue
        dx_rows = torch.empty(rows, dim, dtype=dtype) if copy_dx else dx[members]
        for part, weight in call.weight_blocks(block, width):
            columns = logits[:, part]
            if call.x_grad and part.start == 0:
                torch.mm(columns, weight, out=dx_rows)
            elif call.x_grad:
                dx_rows.addmm_(columns, weight)
            if not call.weight_grad:
                continue
            if written:
                dweight[part].addmm_(columns.T, x)
            else:
                torch.mm(columns.T, x, out=dweight[part])
        written = max(written, width)
        if copy_dx:
            dx.index_copy_(0, order[members], dx_rows)
    if call.weight_grad and written < classes:
        dweight[written:].zero_()
    loss = (extension.lce_loss_f64 if double else extension.lce_loss_f32)(order_p, scale_p, nll_p, count)
    return torch.full((), loss, dtype=dtype), nll, correct, dx, dweight
