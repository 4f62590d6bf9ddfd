"""Public function embedding and its registration with torch.library."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from m4kernels import _checks
from m4kernels._library import Op, is_batched
from m4kernels.dispatch import Dispatcher
from m4kernels.ops.embedding.arguments import OP, EmbeddingArguments, EmbeddingBackend

dispatcher: Dispatcher[EmbeddingBackend] = Dispatcher(OP, ("cpp", "reference"), EmbeddingBackend)


def embedding(
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (T,)
    *,
    backend: str | None = None,
) -> Tensor:
    """`F.embedding(ids, weight)`, whose gradient on a CPU is written once, in memory that is at hand.

    PyTorch takes fresh memory for the gradient of the whole weight, which the system hands out page after page: most of
    the time where few of many rows have a token. Here a large gradient goes where an earlier one was, once nobody holds
    that. Both give the same bits, on every run and for every number of threads: a row's tokens are added in their
    order. Differentiable in weight, twice too.

    Args:
        weight: floating.
        ids: int64 or int32, rows of weight.
        backend: of the gradient: "cpp" (float32 and float64 on a CPU), "reference" or "auto", the fastest that can run;
            default what the variable M4KERNELS_BACKEND names, else auto.

    Returns:
        (T, D) of the dtype of weight.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        IndexError: on a CPU, an id is not a row.
    """
    _checks.tensor(f"{OP}: weight", weight)
    _checks.tensor(f"{OP}: ids", ids)
    return _op(weight, ids, backend or "")


def _forward(weight: Tensor, ids: Tensor, _backend: str) -> Tensor:
    EmbeddingArguments(weight, ids, weight.shape[0]).check_structure()
    return F.embedding(ids, weight)


def _forward_fake(weight: Tensor, ids: Tensor, _backend: str) -> Tensor:
    EmbeddingArguments(weight, ids, weight.shape[0]).check_structure()
    return weight.new_empty(ids.shape[0], weight.shape[1])


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, ctx.backend = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    function = _backward_op.through_the_dispatcher if is_batched(grad) else _backward_op
    return function(grad, ids, ctx.rows, ctx.backend), None, None


def _backward(grad: Tensor, ids: Tensor, rows: int, backend: str) -> Tensor:
    call = EmbeddingArguments(grad, ids, rows)
    call.check_gradient()
    return dispatcher.select(backend, call).embedding_backward(call)


def _backward_fake(grad: Tensor, ids: Tensor, rows: int, _backend: str) -> Tensor:
    EmbeddingArguments(grad, ids, rows).check_gradient()
    return grad.new_empty(rows, grad.shape[1])


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, _, ctx.backend = inputs
    ctx.save_for_backward(ids)


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    function = _op.through_the_dispatcher if is_batched(grad) else _op
    return function(grad, ids, ctx.backend), None, None, None


_op: Op = Op(
    f"{OP}(Tensor weight, Tensor ids, str backend) -> Tensor",
    _forward,
    _forward_fake,
    _forward_backward,
    _forward_setup,
)
_backward_op: Op = Op(
    f"{OP}_backward(Tensor grad, Tensor ids, SymInt rows, str backend) -> Tensor",
    _backward,
    _backward_fake,
    _backward_backward,
    _backward_setup,
)
