"""The torch.library namespace `m4kernels`: `torch.ops.m4kernels.*`, and how the public functions call it.

`Library.define` and `impl` are used rather than `torch.library.custom_op` because a call through them costs 5 to 9 µs
instead of about 31 µs; an op with autograd costs 60 to 130 µs more. Where nothing would see the call, `Op` skips both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_c = torch._C
_library = torch.library.Library("m4kernels", "DEF")

_PLAIN_ARGUMENTS = frozenset({Tensor, torch.nn.Parameter, int, float, bool, str, type(None), tuple, list, torch.dtype})


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether something relies on the call going through PyTorch's dispatcher: a tracer, a mode, a functorch transform,
    a profiler, a tensor subclass, a tensor that is negated lazily or has no memory (meta)."""
    if (
        not _PLAIN_ARGUMENTS.issuperset(map(type, args))
        or _c._len_torch_dispatch_stack()
        or _c._len_torch_function_stack()
        or _c._are_functorch_transforms_active()
        or _c._get_tracing_state() is not None
        or _c._autograd._profiler_enabled()
    ):
        return True
    for x in args:  # noqa: SIM110 (three times as fast as a generator)
        if isinstance(x, Tensor) and (x.is_neg() or not (x.is_cpu or x.is_cuda)):
            return True
    return False


class Op:
    """An op of the namespace; a call runs the implementation itself where nothing watches it, else `torch.ops`.

    The op picks its backend itself, so one implementation serves every device.

    Args:
        schema: such as `"scale(Tensor x, float factor, str backend) -> Tensor"`.
        implementation: called with real tensors.
        fake: computes the outputs' metadata from fake tensors.
        backward, setup_context: the derivative, as in `torch.library.register_autograd`; default none.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
    ) -> None:
        name = schema.split("(", 1)[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"m4kernels::{name}", fake, lib=_library)
        self._registered = getattr(torch.ops.m4kernels, name).default
        self._implementation = implementation
        self._function: type[torch.autograd.Function] | None = None
        if backward is not None and setup_context is not None:
            torch.library.register_autograd(f"m4kernels::{name}", backward, setup_context=setup_context, lib=_library)
            self._function = _as_function(name, implementation, backward, setup_context)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(args):
            return self._registered(*args)
        if not (torch.is_grad_enabled() and _c._any_requires_grad(*args)):
            return self._implementation(*args)
        return self._registered(*args) if self._function is None else self._function.apply(*args)


def _as_function(
    name: str,
    implementation: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> type[torch.autograd.Function]:
    # One forward that takes ctx: with a separate setup_context, PyTorch binds the signature anew on every call.
    def forward(ctx: Any, *args: Any) -> Any:
        output = implementation(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)
