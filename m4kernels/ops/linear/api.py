"""Public function linear and its registration with torch.library."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from m4kernels import _checks, _ext
from m4kernels._library import Op, constant_when_traced, is_batched
from m4kernels.dispatch import AUTO, Dispatcher
from m4kernels.ops.linear.arguments import OP, LinearArguments, LinearBackend, Wanted
from m4kernels.processor import has_amx, slow_bf16

dispatcher: Dispatcher[LinearBackend] = Dispatcher(OP, ("cpp", "reference"), LinearBackend)

# Where the automatic choice takes our own products (measured in benchmarks/NOTES.md, "linear"): of float32 with
# registers of 512 bits, since PyTorch's are faster with narrower ones; of bfloat16 where no instruction multiplies it.
OWN_LEVELS = {torch.float32: ("avx512", "avx512bf16"), torch.bfloat16: ("avx2", "avx512")}
# Fewer rows, and packing the weight costs more than multiplying it faster gains; a narrower weight, and the call's own
# 40 us do. Neither counts in bfloat16 without instructions for it, where PyTorch's products are several times slower.
FEWEST_ROWS = 256
NARROWEST = 256


def linear(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    gelu: bool = False,
    residual: Tensor | None = None,  # (T, N)
    backend: str | None = None,
) -> Tensor:
    """`F.linear(F.gelu(x) if gelu else x, weight, bias) + residual`, without the tensors in between.

    GELU with the exact normal distribution (Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415) is computed
    as x is read, and once more in the backward pass; so only x is kept for that. Differentiable once, in all tensors;
    but what PyTorch computes (see `backend`) as often as PyTorch does.

    In the backends, products of float32 are of float32 whatever `torch.set_float32_matmul_precision` says, and those of
    bfloat16 add up in float32.
    Under `torch.autocast` GELU(x) and weight are rounded to its dtype, bias and residual are not; the result has that
    dtype, or the residual's where it is wider, and a float32 weight receives its gradient in full float32. The backend
    cpp gives the same bits for every number of threads.

    Args:
        x: float32, bfloat16, float16 or float64.
        weight: the same dtype as x (any of these under autocast), as `torch.nn.Linear` has it.
        bias, residual: any of these dtypes.
        gelu: whether the layer's input is GELU(x).
        backend: "cpp" (CPU; float32 and bfloat16), "reference" or "auto"; default what the variable M4KERNELS_BACKEND
            names, else auto. The automatic choice is cpp on a CPU, in float32 with AVX-512 for T, K and N of some
            hundreds at least, in bfloat16 with AVX2 where no instruction multiplies bfloat16; elsewhere, and on
            every GPU, the expression above, which PyTorch computes and differentiates.

    Returns:
        (T, N), contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        _checks.tensor(f"{OP}: x", x)
        _checks.tensor(f"{OP}: weight", weight)
    autocast_dtype = _autocast_dtype(x)
    named = _named(backend or "")
    if named in ("", AUTO):
        call = LinearArguments(x, weight, bias, residual, bool(gelu), autocast_dtype)
        if not own_products_serve(call):
            call.check_structure()
            return _in_pytorch(call)
        named = "cpp"
    return _op(x, weight, bias, residual, bool(gelu), autocast_dtype, named)


def own_products_serve(call: LinearArguments) -> bool:
    """Whether the automatic choice takes the backend cpp for a call."""
    x, weight = call.x, call.weight
    if x.device.type != "cpu" or x.dim() != 2 or weight.dim() != 2 or call.foreign_dtype() is not None:
        return False
    if why_not_own_products(call.operand_dtype) is not None:
        return False
    large = x.shape[0] >= FEWEST_ROWS and min(weight.shape) >= NARROWEST
    return large or (call.operand_dtype == torch.bfloat16 and not _has_fast_bf16())


@constant_when_traced
def _named(backend: str) -> str:
    return dispatcher.named(backend)


@constant_when_traced
def why_not_own_products(dtype: torch.dtype) -> str | None:
    """Why the automatic choice never takes the backend cpp for operands of float32, of bfloat16, on this machine; None
    where it does."""
    extension = _ext.load()
    if extension is None:
        return _ext.absent()
    if dtype == torch.bfloat16 and has_amx():
        return "the processor has AMX, which PyTorch's products use"
    level = extension.simd_level()
    return None if level in OWN_LEVELS[dtype] else f"at the SIMD level {level} PyTorch's products are as fast"


@constant_when_traced
def _has_fast_bf16() -> bool:
    return slow_bf16() is None


def _in_pytorch(call: LinearArguments) -> Tensor:
    y = F.linear(F.gelu(call.x) if call.gelu else call.x, call.weight, call.bias)
    return y if call.residual is None else y + call.residual


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds x to, if it is at work; float64 stays, and meta tensors have no autocast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _without_autocast(call: LinearArguments) -> AbstractContextManager[Any]:
    """The products are in the dtype that the call asks for: autocast must not touch those inside."""
    device = call.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _select(call: LinearArguments, backend: str) -> LinearBackend:
    call.check_structure()
    return dispatcher.select(backend, call)


def _forward(*args: Any) -> Tensor:
    call = LinearArguments(*args[:-1])
    module = _select(call, args[-1])
    with _without_autocast(call):
        return module.linear(call)


def _forward_fake(*args: Any) -> Tensor:
    call = LinearArguments(*args[:-1])
    call.check_structure()
    return call.x.new_empty((call.x.shape[0], call.weight.shape[0]), dtype=call.result_dtype)


def _backward_call(args: tuple[Any, ...]) -> tuple[Tensor, LinearArguments, Wanted]:
    grad, x, weight, bias, gelu, autocast_dtype, *wanted = args[:-1]
    call = LinearArguments(x, weight, bias, None, gelu, autocast_dtype)
    call.check_structure()
    call.check_gradient(grad)
    return grad, call, Wanted(*wanted)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, call, wanted = _backward_call(args)
    module = _select(call, args[-1])
    with _without_autocast(call):
        return module.linear_backward(call, grad, wanted)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, call, wanted = _backward_call(args)
    return (
        call.x.new_empty(call.x.shape) if wanted.x else call.x.new_empty(0),
        call.weight.new_empty(call.weight.shape) if wanted.weight else call.x.new_empty(0),
        call.bias.new_empty(call.bias.shape) if wanted.bias and call.bias is not None else call.x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, ctx.gelu, ctx.autocast_dtype, ctx.backend = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    gradients: list[Tensor | None] = [None] * 3
    if any(needs[:3]):
        backward = _backward_op.through_the_dispatcher if is_batched(grad) else _backward_op
        found = backward(grad, *ctx.saved_tensors, ctx.gelu, ctx.autocast_dtype, *needs[:3], ctx.backend)
        gradients = [gradient if need else None for gradient, need in zip(found, needs[:3], strict=True)]
    residual = grad.to(cast(torch.dtype, ctx.residual_dtype)) if needs[3] else None
    return *gradients, residual, None, None, None


def _no_second_derivative(_ctx: Any, *_grads: Tensor) -> None:
    raise NotImplementedError(
        f"{OP}: the second derivative is not implemented; use torch.nn.functional.linear and torch.nn.functional.gelu"
    )


_op = Op(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool gelu, ScalarType? autocast_dtype, str backend)"
    " -> Tensor",
    _forward,
    _forward_fake,
    _autograd_backward,
    _setup_context,
)
_backward_op = Op(
    f"{OP}_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool gelu, ScalarType? autocast_dtype,"
    " bool x_grad, bool weight_grad, bool bias_grad, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
    _no_second_derivative,
    lambda ctx, inputs, output: None,
)
