"""linear_cross_entropy on a GPU: the library's matrix products, and Triton kernels between them.

Logits exist for some tokens and some classes at a time, in the dtype of the operands, and become their gradients in
place. `plan` chooses between two forms by the workspace:

- whole rows: a chunk of tokens over all classes. Three matrix products a logit; d weight is added to once a chunk.
- parts of rows, for small workspaces: all tokens, or many, over a part of the classes. A first sweep over the classes
  finds each row's maximum and sum, a second computes the logits again: four products a logit (one part is not computed
  again). d weight is written once a chunk of tokens, d x added to once a part.

Nothing waits for the device, so that a CUDA graph can capture a call: all shapes follow from the arguments' shapes.
Hence ignored tokens and classes beyond a token's limit are multiplied like all others (the CPU backend leaves them out,
but how many there are is known to the device only); the kernels do not read them and write their gradients as 0. Rows
are independent, so tokens are neither sorted nor gathered, and d weight always adds up in the order of the tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4kernels._triton import bfloat16_unfit, launch_on
from m4kernels.ops.linear_cross_entropy import triton_kernels as kernels
from m4kernels.ops.linear_cross_entropy.arguments import LossArguments, reads_as_it_lies

# Launches by width of a row: (block, warps). 8 elements a thread, so that a 16-bit row is read 16 bytes a thread and
# iteration; with 16 elements the compiler takes up to 100 registers or spills. At no more than 64 registers, which the
# compile gate holds, two rows of the widest block share a multiprocessor, and one's arithmetic hides the other's memory
# accesses. A row of 65,536 is then read from memory once, and for the gradient a second time from the L2 cache: 264
# rows of 128 KB on 132 multiprocessors are 34 MB of its 50. A row held in registers instead would need 1,024 threads
# with all 64 registers, thus one row a multiprocessor, whose reading, exponentials and writing do not overlap.
LAUNCHES = ((256, 1), (1024, 4), (4096, 16))
MAX_REGISTERS = 64
# The ceiling is told to the compiler too: left to itself, that of Triton 3.8 takes 40 registers, for three rows, and
# spills two numbers of each row. The other kernels fit three rows without spills, and would no longer if it were told.
WHOLE_ROWS = {"maxnreg": MAX_REGISTERS}
VECTOR = (1024, 4)  # (block, warps) of the kernels over rows of x
TOKENS = {"BLOCK": 1024, "num_warps": 16}  # of the one program over all tokens
SCALE = (4096, 8)  # of the pass over a gradient: few programs, since most often they return at once
PITCH = 16  # elements: rows begin at multiples of 32 bytes, which wide loads and the tensor cores' products ask for
# Whole rows pay from so many tokens a chunk on: adding to d weight moves 8 bytes an entry, a fourth product costs 2
# FLOP an entry and token; 600 TFLOP/s in 16 bits (50 in float32) over 4 TB/s make 600 (50) tokens worth one addition.
FEW_ROWS = {2: 512, 4: 64}
FEW_COLUMNS = 256  # with fewer classes a part the products are inefficient, so then tokens are divided instead
TOO_OLD = (
    "bfloat16 and float16 need torch 2.10, whose addmm adds their product to a float32 matrix; this is torch {version}"
)


def can_run(call: LossArguments) -> str | None:
    """float32, bfloat16 and float16 operands, where the GPU has them."""
    dtype = call.operand_dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    if call.device.type != "cuda" or dtype == torch.float32:
        return None
    unfit = bfloat16_unfit(call.device) if dtype == torch.bfloat16 else None
    if unfit is not None:
        return unfit
    version = torch.__version__.split("+")[0]
    return TOO_OLD.format(version=version) if tuple(map(int, version.split(".")[:2])) < (2, 10) else None


class Plan(NamedTuple):
    """Tokens and classes whose logits exist at a time."""

    rows: int
    columns: int

    @property
    def pitch(self) -> int:
        """Distance of two rows of logits, in elements."""
        return _pitch(self.columns)


def plan(call: LossArguments) -> Plan:
    """How to divide the logits so that everything fits `max_workspace_bytes`.

    Raises:
        ValueError: it does not hold one token and one class.
    """
    tokens, dim = call.x.shape
    classes, size = call.weight.shape[0], call.operand_dtype.itemsize
    # Over all tokens: target, limit, scale and loss, 16 bytes. A row: x, and its state. A class: a converted weight.
    room = call.max_workspace_bytes - 16 * tokens - 4096
    row, column = dim * size + 16, 0 if _weight_as_it_lies(call) else dim * size
    rows = max(0, room - classes * column) // (_pitch(classes) * size + row)
    if rows >= min(tokens, FEW_ROWS[size]) or (rows and classes <= FEW_COLUMNS):
        return Plan(_even(tokens, rows, 16), classes)
    columns = FEW_COLUMNS
    while columns > 1 and (room - columns * column) // (columns * size + row) < min(tokens, columns):
        columns //= 2
    rows = min(tokens, (room - columns * column) // (columns * size + row))
    if rows < 1:
        raise call.too_little_workspace(call.max_workspace_bytes - room + size + row + column)
    rows = _even(tokens, rows, 16)
    columns = max(columns, (room - rows * row) // (rows * size + column))
    multiple = next(m for m in (64, PITCH, 1) if columns >= m)
    return Plan(rows, _even(classes, columns // multiple * multiple, multiple))


def _pitch(columns: int) -> int:
    return columns if columns < PITCH else -(-columns // PITCH) * PITCH


def _even(count: int, most: int, multiple: int) -> int:
    """The size of parts that `count` things fall into: at most `most`, nearly even, if possible a multiple."""
    even = -(-count // -(-count // min(count, most)))
    return min(-(-even // multiple) * multiple, most, count)


def _weight_as_it_lies(call: LossArguments) -> bool:
    return call.weight.dtype == call.operand_dtype and reads_as_it_lies(call.weight)


def linear_cross_entropy(call: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.linear_cross_entropy, except that logits and their gradients are rounded to the operands' dtype."""
    if call.x.is_cpu:  # under the interpreter; on a GPU the kernel that reads them first does
        call.check_values()
    with launch_on(call.x):
        return _run(call)


def _run(call: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, (tokens, dim), classes = call.x, call.x.shape, call.weight.shape[0]
    gradient, boosted = call.x_grad or call.weight_grad, call.operand_dtype == torch.float16
    new = x.new_empty if tokens else x.new_zeros
    nll = new(tokens, dtype=torch.float32)
    correct = new(tokens, dtype=torch.bool)
    dx = new((tokens, dim) if call.x_grad else 0, dtype=torch.float32)
    dweight = new((classes, dim) if call.weight_grad else 0, dtype=torch.float32)
    if tokens == 0:
        return x.new_zeros((), dtype=torch.float32), nll, correct, dx, dweight

    size = plan(call)
    target, limit = x.new_empty((2, tokens), dtype=torch.int32)
    scale, term = x.new_empty((2, tokens), dtype=torch.float32)
    boost = x.new_empty(2, dtype=torch.float32)
    call.check_on_device(_prepare(call, target, limit, scale, boost))
    tokens_at = {"target": target, "limit": limit, "scale": scale}
    results = {"nll": nll, "term": term, "correct": correct}
    whole = size.columns >= classes
    parts = [slice(v, min(v + size.columns, classes)) for v in range(0, classes, size.columns)]
    weight = _Weight(call, size.columns)
    operands = x.new_empty((size.rows, dim), dtype=call.operand_dtype)
    workspace = x.new_empty((size.rows, size.pitch), dtype=call.operand_dtype)
    states = {"state": None if whole else x.new_empty((3, size.rows), dtype=torch.float32), "rows": size.rows}
    best = None if whole else x.new_empty(size.rows, dtype=torch.int32)
    launch = launch_of(size.columns)
    for first in range(0, tokens, size.rows):
        rows = min(size.rows, tokens - first)
        block, x_rows = slice(first, first + rows), operands[:rows]
        _gather(x, target, x_rows, first)
        for part in parts:
            logits = workspace[:rows, : part.stop - part.start]
            multiply(x_rows, weight.rows(part).T, logits)
            common = {"logits": logits, "first": first, "pitch": size.pitch} | tokens_at | results | launch
            if whole:
                kernels.whole_rows_kernel[(rows,)](
                    **common, boost=boost, width=classes, GRADIENT=gradient, **WHOLE_ROWS
                )
            else:
                kernels.sweep_kernel[(rows,)](**common, **states, **_classes(part), best=best, classes=classes)
        if not gradient:
            continue
        for part in reversed(parts):  # the last part's logits are still there
            logits, again = workspace[:rows, : part.stop - part.start], part is not parts[-1]
            if again:
                multiply(x_rows, weight.rows(part).T, logits)
            if not whole:
                common = {"logits": logits, "first": first, "pitch": size.pitch} | tokens_at | launch
                kernels.gradient_kernel[(rows,)](**common, **states, **_classes(part), boost=boost)
            if call.x_grad:
                multiply(logits, weight.rows(part), dx[block], add=again)
            if call.weight_grad:
                multiply(logits.T, x_rows, dweight[part], add=first > 0)
    if call.x_grad:
        kernels.finish_rows_kernel[(tokens,)](
            dx=dx, target=target, boost=boost, dim=dim, BOOST=boosted, **vector_launch(dim)
        )
    if call.weight_grad and boosted:
        dweight.mul_(boost[1])
    return term.sum(), nll, correct, dx, dweight


def _classes(part: slice) -> dict[str, int]:
    return {"i_class": part.start, "width": part.stop - part.start}


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, with `add` out += a @ b, summed in float32 where the dtype of `out` allows it.

    No temporary: on CUDA the library adds a 16-bit product to a float32 matrix where that lies.
    """
    if out.dtype != a.dtype and not a.is_cuda:  # under the interpreter; the CPU's products have one dtype only
        a, b = a.to(out.dtype), b.to(out.dtype)
    other: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, **other, out=out)
    else:
        torch.mm(a, b, **other, out=out)


class _Weight:
    """Parts of the weight as operands of the products; where they must be converted, `most` classes at a time."""

    def __init__(self, call: LossArguments, most: int) -> None:
        self._weight = call.weight
        self._copy: Tensor | None = None
        self._holds: slice | None = None
        if not _weight_as_it_lies(call):
            self._copy = call.weight.new_empty((most, call.weight.shape[1]), dtype=call.operand_dtype)

    def rows(self, part: slice) -> Tensor:
        """(classes of the part, D); valid until the next call."""
        if self._copy is None:
            return self._weight[part]
        copy = self._copy[: part.stop - part.start]
        if self._holds != part:
            copy.copy_(self._weight[part])
            self._holds = part
        return copy


def _prepare(call: LossArguments, target: Tensor, limit: Tensor, scale: Tensor, boost: Tensor) -> Tensor:
    """Write them; () bool, whether all targets and limits are in range."""
    right = target.new_empty((), dtype=torch.bool)
    limits, weights = call.vocab_limit, call.token_weight
    kernels.prepare_kernel[(1,)](
        targets=call.targets,
        limits=limits,
        weights=weights,
        target=target,
        limit=limit,
        scale=scale,
        boost=boost,
        right=right,
        tokens=len(target),
        classes=call.weight.shape[0],
        ignore_index=call.ignore_index,
        stride_targets=call.targets.stride(0),
        stride_limits=0 if limits is None else limits.stride(0),
        stride_weights=0 if weights is None else weights.stride(0),
        BOOST=call.operand_dtype == torch.float16,
        **TOKENS,
    )
    return right


def _gather(x: Tensor, target: Tensor, out: Tensor, first: int) -> None:
    rows, dim = out.shape
    stride_x, stride_x_dim = x.stride()
    kernels.gather_kernel[(rows,)](
        x=x,
        target=target,
        out=out,
        first=first,
        dim=dim,
        stride_x=stride_x,
        stride_x_dim=stride_x_dim,
        **vector_launch(dim),
    )


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """`values.mul_(factor)` for contiguous float32 values and a 0-dimensional factor on the same device, without
    touching the values where the factor is 1; nothing waits for the device to find that out."""
    block, warps = SCALE
    with launch_on(values):
        grid = (-(-values.numel() // block),)
        kernels.scale_kernel[grid](values=values, factor=factor, count=values.numel(), BLOCK=block, num_warps=warps)
    return values


def launch_of(width: int) -> dict[str, int]:
    """Launch options of the kernels over rows of logits."""
    block, warps = next((launch for launch in LAUNCHES if launch[0] >= width), LAUNCHES[-1])
    return {"BLOCK": block, "num_warps": warps}


def vector_launch(dim: int) -> dict[str, int]:
    """Launch options of the kernels over rows of x."""
    return {"BLOCK": VECTOR[0], "num_warps": VECTOR[1]} if dim > 256 else {"BLOCK": 256, "num_warps": 1}
