"""Public function cross_modal_attention, and how attention is registered with torch.library."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from m4kernels import _checks
from m4kernels._dtypes import compute_dtype
from m4kernels._library import Op, is_batched
from m4kernels.dispatch import Dispatcher
from m4kernels.ops.cross_modal_attention.arguments import OP, AttentionArguments, AttentionBackend
from m4kernels.segments import Segments

dispatcher: Dispatcher[AttentionBackend] = Dispatcher(OP, ("triton", "cpp", "reference"), AttentionBackend)


def cross_modal_attention(
    q: Tensor,  # (Tq, H, Dh)
    k: Tensor,  # (Tk, Hkv, Dh)
    v: Tensor,  # (Tk, Hkv, Dh)
    q_segments: Segments,
    k_segments: Segments,
    *,
    allow: Tensor | None = None,  # (M, M)
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over packed samples: for each sample b, with rows and keys the slices that the segments give it,
    `out[rows] = softmax(q[rows] @ k[keys].T * scale + log(allow[m_rows][:, m_keys])) @ v[keys]` for every head.

    A query attends to the keys of its own sample only. The query head h uses the key-value head h // (H / Hkv). A row
    with nothing to attend to gives 0, and 0 gradients; so does the tail of tokens that belong to no sample. Scaled
    dot-product attention of Vaswani et al. (2017), https://arxiv.org/abs/1706.03762; grouped heads of Ainslie et al.
    (2023), https://arxiv.org/abs/2305.13245. Differentiable once, in q, k and v. Deterministic: the same bits on every
    run and for every number of threads.

    Args:
        q: float32, bfloat16, float16 or float64; queries of all samples, one after another. Computed in float32,
            float64 in float64. Views into a fused projection are fine.
        k: keys, of the dtype of q; H must be a multiple of Hkv.
        v: values, of the shape and dtype of k.
        q_segments: where each sample and modality lies in q.
        k_segments: where each sample and modality lies in k; the same B and M. For self-attention the same object.
        allow: bool, allow[i, j] says whether queries of modality i attend to keys of modality j; default all do.
        scale: factor of the scores; default Dh ** -0.5.
        backend: "triton" (CUDA; not float64, head_dim at most 128; for tests also on CPU tensors, with
            TRITON_INTERPRET=1 set), "cpp" (CPU; not float64), "reference" or "auto", the fastest that can run; default
            what the variable M4KERNELS_BACKEND names, else auto.

    Returns:
        (Tq, H, Dh) of the dtype of q, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit, or, for CPU tensors, the values of the segments are
            inconsistent or do not lie within q and k; the message names the argument.
    """
    q_parts, k_parts = parts_of(f"{OP}: q_segments", q_segments), parts_of(f"{OP}: k_segments", k_segments)
    return _op(q, k, v, *q_parts, *k_parts, allow, scale_of(OP, scale), backend or "")[0]


def parts_of(name: str, segments: Segments) -> tuple[Tensor, Tensor, int]:
    """What a schema takes of segments; ValueError where they are something else."""
    if not isinstance(segments, Segments):
        raise ValueError(f"{name} must be Segments, got {type(segments).__name__}: use Segments.from_counts")
    return segments.cu_seqlens, segments.counts, segments.max_seqlen


def scale_of(op: str, scale: float | None) -> float | None:
    return scale if scale is None else _checks.number(f"{op}: scale", scale)


SEGMENTS = "Tensor {0}cu_seqlens, Tensor {0}counts, SymInt {0}max_seqlen"
OPTIONS = "Tensor? allow, float? scale, str backend"


def register(
    name: str,
    arguments: str,
    leaves: int,
    views: Callable[..., Sequence[Tensor]],
    call_of: Callable[..., AttentionArguments],
) -> Op:
    """Register an op that gives (out, lse), and `<name>_backward`.

    Args:
        arguments: of its schema, the last being the backend.
        leaves: how many of the first ones are differentiable.
        views: (q, k, v) as they lie in tensors of the leaves' shapes.
        call_of: the call of all arguments but the backend.
    """

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        call = call_of(*args[:-1])
        call.check_structure()
        module = dispatcher.select(args[-1], call)
        call.check_values()
        return module.cross_modal_attention(call)

    def forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
        call = call_of(*args[:-1])
        call.check_structure()
        q = call.q
        return q.new_empty(q.shape), q.new_empty(call.lse_shape, dtype=compute_dtype(q.dtype))

    def backward(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> Tensor | tuple[Tensor, ...]:
        call = call_of(*args[:-1])
        call.check_structure()
        call.check_gradient(grad_out, out, lse)
        module = dispatcher.select(args[-1], call)
        call.check_values()
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in args[:leaves])
        q, k, v = views(*grads)
        module.cross_modal_attention_backward(call, grad_out, out, lse, (q, k, v))
        return grads if leaves > 1 else grads[0]

    def backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> Tensor | tuple[Tensor, ...]:
        call = call_of(*args[:-1])
        call.check_structure()
        call.check_gradient(grad_out, out, lse)
        grads = tuple(x.new_empty(x.shape) for x in args[:leaves])
        return grads if leaves > 1 else grads[0]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # of lse, which never has a gradient: zeros, filled at every call
        ctx.save_for_backward(*output, *(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = tuple(None if isinstance(x, Tensor) else x for x in inputs)

    def autograd_backward(ctx: Any, grad_out: Tensor | None, _grad_lse: None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.others) - leaves)
        if grad_out is None:  # what uses the result has no gradient for it
            return (None,) * leaves + rest
        out, lse, *saved = ctx.saved_tensors
        args = (other if x is None else x for x, other in zip(saved, ctx.others, strict=True))
        call = backward_op.through_the_dispatcher if is_batched(grad_out) else backward_op
        grads = call(grad_out, out, lse, *args)
        return (*grads, *rest) if leaves > 1 else (grads, *rest)

    def no_second_derivative(_ctx: Any, *_grads: Tensor) -> None:
        raise NotImplementedError(
            f"{name}: the second derivative is not implemented; use torch.nn.functional.scaled_dot_product_attention "
            "on each sample"
        )

    op = Op(f"{name}({arguments}) -> (Tensor out, Tensor lse)", forward, forward_fake, autograd_backward, setup_context)
    results = ", ".join(["Tensor"] * leaves)
    backward_op = Op(
        f"{name}_backward(Tensor grad_out, Tensor out, Tensor lse, {arguments}) -> ({results})",
        backward,
        backward_fake,
        no_second_derivative,
        lambda ctx, inputs, output: None,
    )
    return op


_op = register(
    OP,
    f"Tensor q, Tensor k, Tensor v, {SEGMENTS.format('q_')}, {SEGMENTS.format('k_')}, {OPTIONS}",
    leaves=3,
    views=lambda q, k, v: (q, k, v),
    call_of=AttentionArguments.from_flat,
)
