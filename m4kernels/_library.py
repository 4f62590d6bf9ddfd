"""The torch.library namespace `m4kernels`: `torch.ops.m4kernels.*`, and how the public functions call it.

`Library.define` and `impl` are used rather than `torch.library.custom_op` because a call through them costs 5 to 9 µs
instead of about 31 µs; an op with autograd costs 60 to 130 µs more. Where nothing would see the call, `Op` skips both.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_c = torch._C
_library = torch.library.Library("m4kernels", "DEF")

_strided = torch.strided
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def is_batched(grad: Tensor) -> bool:
    """Whether a gradient handed to a backward pass stands for many: `torch.autograd.grad(is_grads_batched=True)`, which
    has a vmap of its own, unknown to `torch.func`."""
    return _c._functorch.is_legacy_batchedtensor(grad)


def in_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, jvp …) is at work."""
    return _c._are_functorch_transforms_active()


def sees_calls() -> bool:
    """Whether something is at work that must see an op's call, or that changes what PyTorch's functions return: a
    tracer, a mode, a transform, forward-mode derivatives."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _c._len_torch_dispatch_stack() > 0
        or _c._len_torch_function_stack() > 0
        or _c._are_functorch_transforms_active()
        or _c._get_tracing_state() is not None
    )


def is_transformed(ctx: Any) -> bool:
    """Whether the forward pass of a derivative's context ran in such a transform; its backward pass may run later."""
    return getattr(ctx, "transformed", False)


def constant_when_traced(function: Any) -> Any:
    """`torch.compiler.assume_constant_result`, but that imports Dynamo and Triton, which takes every start seconds."""
    function._dynamo_marked_constant = True
    return function


class Op:
    """An op of the namespace; a call runs the implementation itself where nothing watches it, else `torch.ops`.

    The op picks its backend itself, so one implementation serves every device. It works under `torch.func.vmap`, a
    sample after another, and with `backward` under the reverse-mode transforms (grad, vjp, jacrev).

    Args:
        schema: such as `"scale(Tensor x, float factor, str backend) -> Tensor"`.
        implementation: called with real tensors.
        fake: computes the outputs' metadata from fake tensors.
        backward, setup_context: the derivative, as in `torch.library.register_autograd`; default none.

    A call raises:
        ValueError: a tensor argument is something else, or a tensor without strides (sparse, nested).
        NotImplementedError: a derivative is asked for by forward mode.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
    ) -> None:
        self.name = name = schema.split("(", 1)[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"m4kernels::{name}", fake, lib=_library)
        self._registered = getattr(torch.ops.m4kernels, name).default
        self._implementation = implementation
        self._function: type[torch.autograd.Function] | None = None
        self._transformable: type[torch.autograd.Function] | None = None
        if backward is not None and setup_context is not None:
            guarded: Any = _Guarded(self)
            torch.library.register_autograd(f"m4kernels::{name}", backward, setup_context=setup_context, lib=guarded)
            self._function = _as_function(name, implementation, backward, setup_context)
            self._transformable = _as_transformable(self, backward, setup_context)
        torch.library.register_vmap(f"m4kernels::{name}", self._call_each, lib=_library)
        self._plain: set[tuple[type, ...]] = set()  # types of arguments that a direct call may have
        arguments = self._registered._schema.arguments
        self._tensors = tuple(i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type))

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._registered(*args)
        if self._is_watched(args):
            if in_transform() and self._transformable is not None:
                return self._transformable.apply(*args)
            return self._registered(*args)
        if not (torch.is_grad_enabled() and _c._any_requires_grad(*args)):
            return self._implementation(*args)
        return self._registered(*args) if self._function is None else self._function.apply(*args)

    def through_the_dispatcher(self, *args: Any) -> Any:
        """The call as `torch.ops` makes it."""
        return self._registered(*args)

    def _is_watched(self, args: tuple[Any, ...]) -> bool:
        """Whether something relies on the call going through PyTorch's dispatcher: a tracer, a mode, a functorch
        transform, a profiler, a tensor subclass, a tensor that is negated lazily or has no memory (meta)."""
        watched = tuple(map(type, args)) not in self._plain and not self._learn_types(args)
        if forward_ad._current_level >= 0:
            self.refuse_forward_mode(args)
        if (
            watched
            or _c._len_torch_dispatch_stack()
            or _c._len_torch_function_stack()
            or _c._are_functorch_transforms_active()
            or _c._get_tracing_state() is not None
            or _c._autograd._profiler_enabled()
        ):
            return True
        for place in self._tensors:
            x = args[place]
            if x is not None and (x.is_neg() or not (x.is_cpu or x.is_cuda) or x.layout is not _strided or x.is_nested):
                self._refuse_layouts(args)
                return True
        return False

    def _learn_types(self, args: tuple[Any, ...]) -> bool:
        """Whether all tensors are plain ones, so that further calls with arguments of these types need no check."""
        if len(args) != len(self._registered._schema.arguments):
            return False  # which the dispatcher will say
        plain = True
        for value, argument in zip(args, self._registered._schema.arguments, strict=True):
            kind = str(argument.type)
            if "Tensor" in kind:
                if isinstance(value, Tensor):
                    plain &= type(value) in _PLAIN_TENSORS
                elif value is not None or not kind.startswith("Optional"):
                    raise ValueError(
                        f"{self.name}: {argument.name} must be a torch.Tensor, got {type(value).__name__}: "
                        "convert it with torch.as_tensor"
                    )
            elif isinstance(value, Tensor):
                raise ValueError(f"{self.name}: {argument.name} must be {kind}, got a tensor: convert it with .item()")
            else:
                plain &= isinstance(value, (int, float, str, tuple, list, torch.dtype, type(None)))
        if plain:
            self._plain.add(tuple(map(type, args)))
        else:
            self._refuse_layouts(args)
        return plain

    def _refuse_layouts(self, args: tuple[Any, ...]) -> None:
        for value, argument in zip(args, self._registered._schema.arguments, strict=True):
            if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_nested):
                kind = "nested" if value.is_nested else str(value.layout)
                raise ValueError(
                    f"{self.name}: {argument.name} must be a dense (strided) tensor, got {kind}: use .to_dense()"
                )

    def refuse_forward_mode(self, args: tuple[Any, ...]) -> None:
        """Raise NotImplementedError where an argument of a differentiable op has a tangent."""
        if forward_ad._current_level < 0 or self._function is None:
            return
        if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
            _no_forward_mode(self.name)

    def _call_each(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """The rule of vmap: one call after another. A GPU is better served by packing."""
        calls = [
            self(
                *(
                    value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value
                    for value, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return self._stack(calls), 0
        return tuple(map(self._stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    def _stack(self, results: Sequence[Tensor]) -> Tensor:
        shapes = {x.shape for x in results}
        if len(shapes) > 1:
            given = ", ".join(str(tuple(shape)) for shape in sorted(shapes))
            raise ValueError(
                f"{self.name}: under vmap every call must give results of one shape, got {given}; "
                "an argument such as capacity fixes it"
            )
        return torch.stack(tuple(results))


def define_in_place(
    schema: str, implementation: Callable[..., None], fake: Callable[..., None], changes: tuple[int, ...]
) -> Callable[..., None]:
    """An op of the namespace that changes lists of tensors and returns nothing; without a derivative.

    Args:
        schema: such as `"double(Tensor(a!)[] xs, str backend) -> ()"`.
        implementation: called with real tensors.
        fake: called with fake ones, to refuse what does not fit.
        changes: places of the arguments that it changes. Their tensors' versions go up, so that autograd refuses a
            backward pass which would need what they held before.
    """
    name = schema.split("(", 1)[0]

    def run(*args: Any) -> None:
        implementation(*args)
        for place in changes:
            torch.autograd.graph.increment_version(args[place])

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"m4kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.m4kernels, name).default


class _Guarded:
    """The library as `torch.library.register_autograd` uses it: its kernel would drop tangents without a word, and
    cannot be transformed."""

    def __init__(self, op: Op) -> None:
        self._op = op

    def impl(self, name: str, kernel: Callable[..., Any], key: str, **options: Any) -> None:
        def guarded(keyset: Any, *args: Any, **keywords: Any) -> Any:
            self._op.refuse_forward_mode(args)
            if in_transform() and torch.is_grad_enabled() and _c._any_requires_grad(*args):
                raise NotImplementedError(
                    f"{name}: torch.func.grad, vjp and jacrev are not implemented within torch.compile and through "
                    f"torch.ops; call m4kernels.{name} eagerly, or differentiate with backward() or autograd.grad"
                )
            return kernel(keyset, *args, **keywords)

        _library.impl(name, guarded, key, **options)


def _no_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name}: forward-mode derivatives (jvp, jacfwd, hessian, torch.autograd.forward_ad) are not implemented; "
        "use reverse mode: backward(), torch.func.grad, vjp or jacrev"
    )


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


def _as_transformable(
    op: Op, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """The form that the transforms of torch.func ask for; slower than `_as_function` by the binding of a signature."""

    def jvp(_ctx: Any, *_tangents: Any) -> None:
        _no_forward_mode(op.name)

    def forward(*args: Any) -> Any:  # called without gradients, and outside all transforms
        return op(*args)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.transformed = True
        setup_context(ctx, inputs, output)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "vmap": staticmethod(op._call_each),
        "jvp": staticmethod(jvp),
    }
    return type(op.name, (torch.autograd.Function,), members)
