"""linear_cross_entropy on the CPU, in one of two ways.

The extension's own products (csrc/linear_cross_entropy/fused.h) run the softmax pass on blocks of logits in a core's
cache. They serve float32 operands, and bfloat16 ones, which the processor multiplies as such where it can. The
library's matrix products over chunks of whole logits serve the rest: float64, float16, and the shapes for which they
are faster.

Only valid tokens are multiplied, and only with the classes that they can be of: tokens are ordered by their vocabulary
limit, widest first.
"""

import torch
from torch import Tensor

from m4kernels import _ext, _memory
from m4kernels._workspace import workspace
from m4kernels.backend import runs_always
from m4kernels.ops.linear_cross_entropy.arguments import LossArguments
from m4kernels.processor import dots_bf16

# Rows of a chunk: from 512 on the matrix products run at full speed, and fresh memory for more logits costs time (two
# AVX-512 cores; see benchmarks/NOTES.md). With few classes more rows, up to 16 MiB of logits, which caches still hold.
MAX_ROWS = 512
FEW_LOGITS = 2**22

# Fewer rows than these, and the library sums a product over all classes one by one; it is cut into this many classes.
FEW_ROWS = 24
CLASSES_A_SUM = 512

# Where our own products are the faster ones (measured in turns, benchmarks/NOTES.md): below, x is packed for too few
# classes or most lanes of a register hold no token; above, a block of the weight leaves the caches.
FEWEST_CLASSES = 1000
FEWEST_TOKENS = 8
WIDEST = 1024
# Bytes of the token table, nll and what is gathered beside them.
FIXED_BYTES_A_TOKEN = 40

can_run = runs_always


def linear_cross_entropy(call: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_cross_entropy."""
    extension, dtype = _ext.require(), call.result_dtype
    double = dtype == torch.float64
    (tokens, dim), classes = call.x.shape, call.weight.shape[0]
    targets = call.targets.contiguous()
    table = torch.empty(3 * tokens, dtype=torch.int64)  # of the valid tokens: index, limit, factor in the loss
    # Their addresses by the names that the extension gives them.
    tokens_at = {name: table.data_ptr() + 8 * i * tokens for i, name in enumerate(("order", "limit", "scale"))}
    count = _order(call, targets, tokens_at)
    order = table[:count] if count < tokens or call.vocab_limit is not None else None
    new = torch.empty if count == tokens else torch.zeros
    nll = new(tokens, dtype=dtype)
    correct = new(tokens, dtype=torch.bool)
    dx = new((tokens, dim) if call.x_grad else 0, dtype=dtype)
    dweight = _memory.empty((classes, dim) if call.weight_grad else (0,), dtype)

    pointers = tokens_at | {"targets": targets.data_ptr(), "nll": nll.data_ptr(), "correct": correct.data_ptr()}
    if not _fused(call, pointers, count, dx, dweight):
        _in_library(call, pointers, order, count, dx, dweight)
    loss = torch.empty((), dtype=dtype)
    (extension.lce_loss_f64 if double else extension.lce_loss_f32)(
        order=tokens_at["order"], scale=tokens_at["scale"], nll=nll.data_ptr(), count=count, out=loss.data_ptr()
    )
    return loss, nll, correct, dx, dweight


def _fused(call: LossArguments, pointers: dict[str, int], count: int, dx: Tensor, dweight: Tensor) -> bool:
    """Fill nll, correct, dx and dweight with the extension's products; False where they cannot or should not serve."""
    x, weight = call.x, call.weight
    round = call.operand_dtype == torch.bfloat16
    if not (round or call.operand_dtype == torch.float32):
        return False
    if weight.shape[0] < FEWEST_CLASSES or weight.shape[1] > WIDEST or count < FEWEST_TOKENS:
        return False
    if not {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}:
        return False
    extension, (classes, dim), threads = _ext.require(), weight.shape, torch.get_num_threads()
    shape: dict[str, int] = {"count": count, "dim": dim, "classes": classes, "threads": threads}
    shape |= {
        "round": round,
        "bf16_products": round and dots_bf16(),
        "weight_is_bf16": weight.dtype != torch.float32,
    }
    shape |= {"weight_row": weight.stride(0), "weight_column": weight.stride(1)}
    # No more than the logits of the library's chunks, however much is allowed: it stays allocated.
    room = min(call.max_workspace_bytes - x.shape[0] * FIXED_BYTES_A_TOKEN, 4 * max(MAX_ROWS * classes, FEW_LOGITS))
    plan = {"x_grad": call.x_grad, "weight_grad": call.weight_grad, "bytes": max(0, room)}
    rows, floats, _ = extension.lce_fused_plan(**shape, **plan)
    if rows == 0:
        return False
    with workspace(floats) as memory:
        extension.lce_fused(
            **pointers,
            **shape,
            x=x.data_ptr(),
            x_is_bf16=x.dtype != torch.float32,
            x_row=x.stride(0),
            x_column=x.stride(1),
            weight=weight.data_ptr(),
            dx=dx.data_ptr() if call.x_grad else 0,
            dweight=dweight.data_ptr() if call.weight_grad else 0,
            workspace=memory.data_ptr(),
            floats=floats,
            rows=rows,
        )
    return True


def _in_library(
    call: LossArguments, pointers: dict[str, int], order: Tensor | None, count: int, dx: Tensor, dweight: Tensor
) -> None:
    """Fill nll, correct, dx and dweight with the library's matrix products over whole chunks of logits."""
    extension, dtype = _ext.require(), call.result_dtype
    double, itemsize = dtype == torch.float64, dtype.itemsize
    (tokens, dim), classes = call.x.shape, call.weight.shape[0]
    everything = order is None or (count == tokens and bool((order.diff() == 1).all()))
    convert_x = not (everything and call.x.dtype == call.operand_dtype == dtype and call.x.is_contiguous())
    # A row: its logits, x gathered and converted (beside the previous chunk's), its gradient.
    per_row_aside = dim * itemsize * (4 * convert_x + 2 * (call.x_grad and not everything))
    room, block = call.divide_workspace(tokens * (32 + 2 * itemsize), classes * itemsize + per_row_aside)
    max_rows = max(MAX_ROWS, FEW_LOGITS // classes)
    chunks = extension.lce_plan(
        limit=pointers["limit"],
        count=count,
        bytes=room,
        per_logit=itemsize,
        per_row=per_row_aside,
        max_rows=max_rows,
    )
    whole = torch.empty(max((rows * width for _, rows, width in chunks), default=0), dtype=dtype)
    run_pass = extension.lce_pass_f64 if double else extension.lce_pass_f32
    gradient, threads = call.x_grad or call.weight_grad, torch.get_num_threads()
    written = 0  # classes of dweight that hold a value
    for first, rows, width in chunks:
        members = slice(first, first + rows)
        if order is None or everything:
            x = call.x if rows == tokens else call.x[members]
        else:
            x = call.x.index_select(0, order[members])
        if convert_x:
            x = x.to(call.operand_dtype).to(dtype).contiguous()
        logits = torch.as_strided(whole, (rows, width), (width, 1))
        for part, weight in call.weight_blocks(block, width):
            torch.mm(x, weight.T, out=_columns(logits, part))
        run_pass(
            **pointers,
            logits=logits.data_ptr(),
            first=first,
            rows=rows,
            width=width,
            gradient=gradient,
            threads=threads,
        )
        if not gradient:
            continue
        if everything:
            dx_rows = dx if rows == tokens or not call.x_grad else dx[members]
        else:
            dx_rows = torch.empty((rows, dim) if call.x_grad else 0, dtype=dtype)
        for part, weight in call.weight_blocks(block, width):
            columns = _columns(logits, part)
            if call.x_grad:
                _product(columns, weight, dx_rows, add=part.start > 0)
            if call.weight_grad:
                _product(columns.T, x, dweight if weight.shape[0] == classes else dweight[part], add=written > 0)
        written = max(written, width)
        if call.x_grad and order is not None and not everything:
            dx.index_copy_(0, order[members], dx_rows)
    if call.weight_grad and written < classes:
        dweight[written:].zero_()


def _order(call: LossArguments, targets: Tensor, tokens_at: dict[str, int]) -> int:
    """Fill in the valid tokens, widest vocabulary first: index, limit and factor in the loss. Returns their number."""
    extension, double = _ext.require(), call.result_dtype == torch.float64
    limit, scale = call.vocab_limit, call.token_weight
    limit = None if limit is None else limit.contiguous()
    scale = None if scale is None else scale.to(call.result_dtype).contiguous()
    count = (extension.lce_order_f64 if double else extension.lce_order_f32)(
        targets=targets.data_ptr(),
        vocab_limit=0 if limit is None else limit.data_ptr(),
        limit_bytes=0 if limit is None else limit.itemsize,
        token_weight=0 if scale is None else scale.data_ptr(),
        tokens=targets.shape[0],
        classes=call.weight.shape[0],
        ignore_index=call.ignore_index,
        **tokens_at,
    )
    if count < 0:
        raise call.value_error(-1 - count)
    return count


def _columns(logits: Tensor, part: slice) -> Tensor:
    return logits if part.start == 0 and part.stop == logits.shape[1] else logits[:, part]


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b."""
    if a.shape[0] < FEW_ROWS and a.shape[1] > CLASSES_A_SUM:
        for first in range(0, a.shape[1], CLASSES_A_SUM):
            part = torch.mm(a[:, first : first + CLASSES_A_SUM], b[first : first + CLASSES_A_SUM])
            out.add_(part) if add or first else out.copy_(part)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
