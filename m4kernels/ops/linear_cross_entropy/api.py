"""Public function linear_cross_entropy, and its registration with torch.library: schema, fake, autograd."""

import os
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from m4kernels import _checks
from m4kernels._library import Op, in_transform, is_batched, is_transformed
from m4kernels.dispatch import AUTO, ENVIRONMENT_VARIABLE, Dispatcher, unavailable
from m4kernels.ops.linear_cross_entropy import small
from m4kernels.ops.linear_cross_entropy.arguments import OP, LossArguments, LossBackend

MAX_WORKSPACE = 2**60  # more is no bound, and numbers of bytes are added up in 64 bits

dispatcher: Dispatcher[LossBackend] = Dispatcher(OP, ("triton", "cpp", "reference"), LossBackend)


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss: Tensor  # ()
    nll: Tensor  # (T,)
    correct: Tensor  # (T,)


def linear_cross_entropy(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (T,)
    *,
    token_weight: Tensor | None = None,  # (T,)
    vocab_limit: Tensor | None = None,  # (T,)
    ignore_index: int = -100,
    max_workspace_bytes: int = 268435456,
    backend: str | None = None,
) -> LinearCrossEntropyOutput:
    """`F.cross_entropy(x @ weight.T, targets)` without ever holding the (T, V) logits.

    With z = x · weightᵀ and L_t = vocab_limit[t]: nll[t] = log Σ_{v < L_t} exp z[t, v] - z[t, targets[t]], 0 where
    targets[t] is `ignore_index`; loss = Σ_t token_weight[t] · nll[t]. An ignored token influences nothing, whatever its
    x, token_weight and vocab_limit hold. Without any valid token the loss and the gradients are 0.

    Tokens are handled in chunks, and the gradients are computed in the forward pass while a chunk's logits exist, if x
    or weight requires one; the backward pass only multiplies them by the gradient of the loss. So they occupy memory
    from the forward pass on, and second derivatives raise a NotImplementedError. Losses of at most 2^15 logits on a CPU
    are PyTorch's own operators over whole logits, which are faster there (and have all derivatives), where no backend
    is named and the call is plain: float32 or float64, every token valid, no vocab_limit, no autocast.

    Products are accumulated, and loss, nll and gradients are held, in float32 (float64 for float64 inputs); each
    gradient is rounded once, to the dtype of its input. The triton backend rounds the logits, and the gradients with
    respect to them, to the dtype of the operands, as `x @ weight.T` and its backward pass do; the cpp backend does so
    with the gradients of bfloat16 operands, on processors that multiply bfloat16 numbers. Under `torch.autocast` x
    and weight may differ in dtype: both are rounded to the autocast dtype for the products, and a float32 weight
    receives its gradient in full float32.
    Runs give the same bits as long as the library's matrix product does: on a CPU, for a fixed number of threads.
    NaN or infinity in the x of a token, or in weight, makes the affected losses and gradients NaN.

    Args:
        x: float32, float64, bfloat16 or float16.
        weight: the same dtype as x (any floating dtype under autocast); V >= 1 classes.
        targets: int64, class of each token, or `ignore_index`.
        token_weight: floating, each token's factor in the loss; default 1 / number of valid tokens, the mean. It gets
            no gradient.
        vocab_limit: int32 or int64, at most V: token t can only be of a class below vocab_limit[t]; default V. It saves
            matrix products on a CPU; on a GPU, where knowing the limits would mean waiting for them, it saves none.
        ignore_index: the target of tokens that do not count.
        max_workspace_bytes: bound on the extra memory, gradients (and the library's own workspace on a GPU) aside.
            On a GPU what does not hold 512 tokens' logits (64 in float32) costs a fourth matrix product beside three.
        backend: "triton" (on a GPU; float32, bfloat16, float16; after a first call, which compiles it, a CUDA graph can
            capture it), "cpp" (on a CPU), "reference" or "auto", the fastest that can run; default what the variable
            M4KERNELS_BACKEND names, else auto.

    Returns:
        loss () in float32 (float64 for float64 inputs), differentiable in x and weight; nll (T,) in the same dtype and
        correct bool (T,), both detached. correct: the target is the most likely class below the limit, the lowest
        such class where several are equal; False where ignored.

    Raises:
        ValueError: a shape, dtype or device does not fit, a target lies outside [0, vocab_limit), a limit exceeds V, or
            the workspace does not hold one token; the message names the argument and the token. On a GPU the values
            are checked by a device assertion, which costs no synchronisation.
    """
    if not torch.compiler.is_compiling() and _is_free(backend):
        whole = small.linear_cross_entropy(
            x, weight, targets, token_weight, vocab_limit, ignore_index, max_workspace_bytes
        )
        if whole is not None:
            return LinearCrossEntropyOutput(*whole)
    return _through_the_op(
        x, weight, targets, token_weight, vocab_limit, ignore_index, max_workspace_bytes, backend or ""
    )


def _through_the_op(
    x: Any,
    weight: Any,
    targets: Any,
    token_weight: Any,
    vocab_limit: Any,
    ignore_index: Any,
    max_workspace_bytes: Any,
    backend: str,
) -> LinearCrossEntropyOutput:
    """The call with its arguments checked as far as the schema cannot say what is wrong."""
    gradients = torch.is_grad_enabled()
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        _checks.tensor(f"{OP}: x", x)
        _checks.tensor(f"{OP}: weight", weight)
    if gradients and isinstance(token_weight, Tensor) and token_weight.requires_grad:
        raise ValueError(f"{OP}: token_weight requires grad, but the loss is not differentiable in it; detach it")
    transformed = in_transform()  # of whose gradients the outermost form of a tensor may know nothing
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        ignore_index = _as_int64(ignore_index)
    if type(max_workspace_bytes) is not int:
        max_workspace_bytes = _checks.integer(f"{OP}: max_workspace_bytes", max_workspace_bytes)
    loss, nll, correct, _, _ = _op(
        x,
        weight,
        targets,
        token_weight,
        vocab_limit,
        ignore_index,
        max(-MAX_WORKSPACE, min(max_workspace_bytes, MAX_WORKSPACE)),
        _autocast_dtype(x),
        gradients and (x.requires_grad or transformed),
        gradients and (weight.requires_grad or transformed),
        backend,
    )
    return LinearCrossEntropyOutput(loss, nll, correct)


def _is_free(backend: str | None) -> bool:
    """Whether nobody names a backend."""
    return backend == AUTO or (not backend and os.environ.get(ENVIRONMENT_VARIABLE, AUTO) in ("", AUTO))


def _as_int64(ignore_index: Any) -> int:
    value = _checks.integer(f"{OP}: ignore_index", ignore_index)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{OP}: ignore_index must be an int64, as targets are, got {value}")
    return value


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds x to, if it is at work; float64 stays, and meta tensors have no autocast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    call = LossArguments(*args[:-1])
    call.check_structure()
    module = dispatcher.select(args[-1], call)
    device = call.device.type
    if not torch.is_autocast_enabled(device):
        return module.linear_cross_entropy(call)
    # The products are in the dtype that the call asks for: autocast must not touch those inside.
    with torch.autocast(device, enabled=False):
        return module.linear_cross_entropy(call)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = LossArguments(*args[:-1])
    call.check_structure()
    x, dtype = call.x, call.result_dtype
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(x.shape[:1], dtype=dtype),
        x.new_empty(x.shape[:1], dtype=torch.bool),
        x.new_empty(x.shape if call.x_grad else (0,), dtype=dtype),
        x.new_empty(call.weight.shape if call.weight_grad else (0,), dtype=dtype),
    )


def _scaled(saved: Tensor, factor: Tensor, is_one: bool, backend: str) -> Tensor:
    """saved * factor; `saved` itself where the backward pass runs once, since a gradient of the weight is large and
    fresh memory costs more than the product. Tracers, which see other types, get the plain product.

    A factor of 1 costs nothing: on a CPU it is looked at, on a GPU a kernel looks before it touches the gradient."""
    if type(saved) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return saved * factor
    if is_one:
        return saved
    in_triton = saved.is_cuda and saved.dtype == torch.float32 and backend in ("", "triton")
    if in_triton and unavailable("triton", saved.device) is None:
        return cast(Any, dispatcher.module("triton")).scale_(saved, factor)
    return saved.mul_(factor)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, *_, x_grad, weight_grad, ctx.backend = inputs
    loss, nll, correct, dx, dweight = output
    ctx.mark_non_differentiable(nll, correct, dx, dweight)
    ctx.set_materialize_grads(False)
    saved = (dx if x_grad else None, dweight if weight_grad else None)
    # Only there may the gradient be differentiated in turn; `_product` says what the loss is for.
    ctx.save_for_backward(*((*saved, loss) if is_transformed(ctx) else saved))
    ctx.dtypes = (x.dtype, weight.dtype)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 11
    dx, dweight, *rest = ctx.saved_tensors
    transformed = is_transformed(ctx)
    shared = transformed or is_batched(grad_loss)  # what such a gradient goes on with must stay as it is
    if torch.is_grad_enabled() and not transformed:  # create_graph=True: saved gradients would pass for constants
        raise NotImplementedError(f"{_NO_SECOND} (backward was called with create_graph=True)")
    gradients: list[Tensor | None] = []
    is_one = not shared and type(grad_loss) is Tensor and grad_loss.is_cpu and grad_loss.item() == 1.0
    needs = ctx.needs_input_grad
    for name, needed, stored, dtype in (
        ("x", needs[0], dx, ctx.dtypes[0]),
        ("weight", needs[1], dweight, ctx.dtypes[1]),
    ):
        if not needed:
            gradients.append(None)
        elif stored is None:
            raise RuntimeError(f"{OP}: {name} requires grad, but the op was called with {name}_grad=False")
        else:
            if transformed:
                gradient = _product_op(stored, grad_loss, *rest)
            else:
                gradient = stored * grad_loss if shared else _scaled(stored, grad_loss, is_one, ctx.backend)
            gradients.append(gradient if dtype == gradient.dtype else gradient.to(dtype))
    return (*gradients, *[None] * 9)


_NO_SECOND = (
    f"{OP}: second derivatives are not implemented; "
    "write the loss as torch.nn.functional.cross_entropy(x @ weight.T, targets)"
)


def _product(saved: Tensor, grad_loss: Tensor, _loss: Tensor) -> Tensor:
    return saved * grad_loss


def _product_fake(saved: Tensor, grad_loss: Tensor, _loss: Tensor) -> Tensor:
    return saved.new_empty(saved.shape)


def _product_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[2]:
        raise NotImplementedError(_NO_SECOND)
    (saved,) = ctx.saved_tensors
    return None, (grad * saved).sum() if ctx.needs_input_grad[1] else None, None


_op = Op(
    f"{OP}(Tensor x, Tensor weight, Tensor targets, Tensor? token_weight, Tensor? vocab_limit, int ignore_index,"
    " int max_workspace_bytes, ScalarType? compute_dtype, bool x_grad, bool weight_grad, str backend)"
    " -> (Tensor loss, Tensor nll, Tensor correct, Tensor dx, Tensor dweight)",
    _forward,
    _fake,
    _backward,
    _setup_context,
)
# d loss / d x or d weight times the gradient of the loss. It takes the loss for the sake of a second derivative, which
# would have to flow through that.
_product_op = Op(
    f"{OP}_gradient(Tensor saved, Tensor grad_loss, Tensor loss) -> Tensor",
    _product,
    _product_fake,
    _product_backward,
    _product_setup_context,
)
