"""Public functions layer_norm and add_layer_norm and their registration with torch.library."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4kernels import _checks
from m4kernels._library import Op, constant_when_traced, is_batched
from m4kernels.dispatch import AUTO, Dispatcher
from m4kernels.ops.layer_norm.arguments import OP, Gradients, NormArguments, NormBackend, Wanted

dispatcher: Dispatcher[NormBackend] = Dispatcher(OP, ("triton", "reference"), NormBackend)


def layer_norm(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (D,)
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`F.layer_norm(x, weight.shape, weight, None, eps).to(out_dtype)`, rounded once, without the tensor in between.

    Layer normalisation without a bias (Ba et al., 2016, https://arxiv.org/abs/1607.06450). As `add_layer_norm` without
    an update, otherwise alike.

    Returns:
        (T, D) in `out_dtype`, by default that of x, contiguous.
    """
    call = _checked(x, None, weight, eps, out_dtype)
    if _pytorch_serves(call, backend):
        return _in_pytorch(call)[0]
    return _op(*call, backend or "")[0]


def add_layer_norm(
    x: Tensor,  # (T, D)
    update: Tensor,  # (T, D)
    weight: Tensor,  # (D,)
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`total = x + update` and `F.layer_norm(total, weight.shape, weight, None, eps).to(out_dtype)`.

    The residual stream of a transformer takes in what a layer adds to it and is normed for the next layer, in one pass
    over memory on a GPU: addition, norm and rounding. So is its derivative: the gradient of the norm, plus that of
    `total` from elsewhere, in the dtypes of x and of update. Differentiable once, in x, update and weight; but what
    PyTorch computes (see `backend`) as often as PyTorch does. Deterministic: the same bits on every run.

    Args:
        x: float32, bfloat16, float16 or float64. Computed in float32, float64 in float64.
        update: any of these dtypes.
        weight: any of these dtypes.
        eps: added to a row's variance.
        out_dtype: of the normed rows; default that of x + update. Autocast changes nothing.
        backend: "triton" (CUDA, up to 8,192 columns; for tests also on CPU tensors, with TRITON_INTERPRET=1 set; not
            float64), "reference" or "auto"; default what the variable M4KERNELS_BACKEND names, else auto. The automatic
            choice is triton on a GPU, elsewhere the expression above, which PyTorch computes and differentiates.

    Returns:
        The normed rows (T, D) in `out_dtype`, and x + update (T, D), contiguous.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message names the argument.
    """
    _checks.tensor(f"{OP}: update", update)
    call = _checked(x, update, weight, eps, out_dtype)
    if _pytorch_serves(call, backend):
        return _in_pytorch(call)
    return _op(*call, backend or "")[:2]


def _checked(x: Tensor, update: Tensor | None, weight: Tensor, eps: float, out_dtype: Any) -> NormArguments:
    _checks.tensor(f"{OP}: x", x)
    _checks.tensor(f"{OP}: weight", weight)
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise ValueError(f"{OP}: out_dtype must be a torch.dtype, got {out_dtype!r}")
    call = NormArguments(x, update, weight, _checks.number(f"{OP}: eps", eps), out_dtype)
    call.check_structure()
    return call


@constant_when_traced
def _named(backend: str) -> str:
    return dispatcher.named(backend)


def _pytorch_serves(call: NormArguments, backend: str | None) -> bool:
    """Whether PyTorch's own functions are the choice: automatically where there is no GPU, and one dtype."""
    return not call.x.is_cuda and call.weight.dtype == call.total_dtype and _named(backend or "") in ("", AUTO)


def _in_pytorch(call: NormArguments) -> tuple[Tensor, Tensor]:
    total = call.x if call.update is None else call.x + call.update
    normed = F.layer_norm(total, call.weight.shape, call.weight, None, call.eps)
    return normed.to(call.normed_dtype), total


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = NormArguments(*args[:-1])
    call.check_structure()
    return dispatcher.select(args[-1], call).layer_norm(call)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = NormArguments(*args[:-1])
    call.check_structure()
    x = call.x
    total = x.new_empty(0 if call.update is None else x.shape, dtype=call.total_dtype)
    mean, rstd = (x.new_empty(x.shape[0], dtype=call.sum_dtype) for _ in range(2))
    return x.new_empty(x.shape, dtype=call.normed_dtype), total, mean, rstd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, update, weight, _, _, ctx.backend = inputs
    _, total, mean, rstd = output
    ctx.dtypes = x.dtype, None if update is None else update.dtype
    ctx.mark_non_differentiable(*([total] if update is None else []), mean, rstd)
    ctx.set_materialize_grads(False)  # zeros, filled at every call, for results that nothing uses
    ctx.save_for_backward(x if update is None else total, weight, mean, rstd)


def _autograd_backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    x_dtype, update_dtype = (dtype if need else None for dtype, need in zip(ctx.dtypes, needs[:2], strict=True))
    if grad is None:  # nothing used the normed rows
        given = [
            None if dtype is None or grad_total is None else grad_total.to(dtype) for dtype in (x_dtype, update_dtype)
        ]
        return *given, *(None,) * 4
    same = x_dtype is not None and x_dtype == update_dtype
    total, weight, mean, rstd = ctx.saved_tensors
    backward = _backward_op.through_the_dispatcher if is_batched(grad) else _backward_op
    dx, dupdate, dweight = backward(
        grad, grad_total, total, weight, mean, rstd, x_dtype, None if same else update_dtype, needs[2], ctx.backend
    )
    if same:
        dupdate = dx
    return (
        None if x_dtype is None else dx,
        None if update_dtype is None else dupdate,
        dweight if needs[2] else None,
        *(None,) * 3,
    )


def _backward_call(args: tuple[Any, ...]) -> tuple[NormArguments, Gradients, Wanted]:
    grad, grad_total, total, weight, mean, rstd, *wanted = args[:-1]
    call = NormArguments(total, None, weight, 0.0, None)
    call.check_structure()
    grads = Gradients(grad, grad_total, mean, rstd)
    grads.check_structure(call)
    return call, grads, Wanted(*wanted)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, grads, wanted = _backward_call(args)
    return dispatcher.select(args[-1], call).layer_norm_backward(call, grads, wanted)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, _, wanted = _backward_call(args)
    x, weight = call.x, call.weight
    dx, dupdate = (
        x.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype) for dtype in (wanted.x, wanted.update)
    )
    return dx, dupdate, weight.new_empty(weight.shape if wanted.weight else 0)


def _no_second_derivative(_ctx: Any, *_grads: Tensor) -> None:
    raise NotImplementedError(f"{OP}: the second derivative is not implemented; use torch.nn.functional.layer_norm")


_op: Op = Op(
    f"{OP}(Tensor x, Tensor? update, Tensor weight, float eps, ScalarType? out_dtype, str backend)"
    " -> (Tensor normed, Tensor total, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
    _autograd_backward,
    _setup_context,
)
_backward_op: Op = Op(
    f"{OP}_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor weight, Tensor mean, Tensor rstd,"
    " ScalarType? x_dtype, ScalarType? update_dtype, bool weight_grad, str backend)"
    " -> (Tensor dx, Tensor dupdate, Tensor dweight)",
    _backward,
    _backward_fake,
    _no_second_derivative,
    lambda ctx, inputs, output: None,
)
