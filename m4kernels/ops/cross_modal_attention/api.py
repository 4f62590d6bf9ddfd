"""Public function cross_modal_attention and its registration with torch.library."""

from typing import Any

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
    if not (isinstance(q_segments, Segments) and isinstance(k_segments, Segments)):
        name, value = ("k", k_segments) if isinstance(q_segments, Segments) else ("q", q_segments)
        raise ValueError(
            f"{OP}: {name}_segments must be Segments, got {type(value).__name__}: use Segments.from_counts"
        )
    if scale is not None:
        scale = _checks.number(f"{OP}: scale", scale)
    q_parts = (q_segments.cu_seqlens, q_segments.counts, q_segments.max_seqlen)
    k_parts = (k_segments.cu_seqlens, k_segments.counts, k_segments.max_seqlen)
    return _op(q, k, v, *q_parts, *k_parts, allow, scale, backend or "")[0]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = AttentionArguments.from_flat(*args[:-1])
    call.check_structure()
    module = dispatcher.select(args[-1], call)
    call.check_values()
    return module.cross_modal_attention(call)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = AttentionArguments.from_flat(*args[:-1])
    call.check_structure()
    q = call.q
    return q.new_empty(q.shape), q.new_empty(call.lse_shape, dtype=compute_dtype(q.dtype))


def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionArguments.from_flat(*args[:-1])
    call.check_structure()
    call.check_gradient(grad_out, out, lse)
    module = dispatcher.select(args[-1], call)
    call.check_values()
    return module.cross_modal_attention_backward(call, grad_out, out, lse)


def _backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionArguments.from_flat(*args[:-1])
    call.check_structure()
    call.check_gradient(grad_out, out, lse)
    return call.q.new_empty(call.q.shape), call.k.new_empty(call.k.shape), call.v.new_empty(call.v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_cu_seqlens, q_counts, ctx.q_max_seqlen, k_cu_seqlens, k_counts, ctx.k_max_seqlen, allow = inputs[:10]
    ctx.scale, ctx.backend = inputs[10:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of lse, which never has a gradient: zeros, filled at every call
    ctx.save_for_backward(*output, q, k, v, q_cu_seqlens, q_counts, k_cu_seqlens, k_counts, allow)


def _autograd_backward(ctx: Any, grad_out: Tensor | None, _grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:  # what uses the result has no gradient for it
        return (None,) * 12
    out, lse, q, k, v, q_cu_seqlens, q_counts, k_cu_seqlens, k_counts, allow = ctx.saved_tensors
    q_parts = (q_cu_seqlens, q_counts, ctx.q_max_seqlen)
    k_parts = (k_cu_seqlens, k_counts, ctx.k_max_seqlen)
    backward = _backward_op.through_the_dispatcher if is_batched(grad_out) else _backward_op
    grads = backward(grad_out, out, lse, q, k, v, *q_parts, *k_parts, allow, ctx.scale, ctx.backend)
    return *grads, *(None,) * 9


def _no_second_derivative(_ctx: Any, *_grads: Tensor) -> None:
    raise NotImplementedError(
        f"{OP}: the second derivative is not implemented; use torch.nn.functional.scaled_dot_product_attention on each "
        "sample"
    )


_SEGMENTS = "Tensor {0}_cu_seqlens, Tensor {0}_counts, SymInt {0}_max_seqlen"
_ARGUMENTS = (
    f"Tensor q, Tensor k, Tensor v, {_SEGMENTS.format('q')}, {_SEGMENTS.format('k')}, Tensor? allow, float? scale, "
    "str backend"
)
_op = Op(f"{OP}({_ARGUMENTS}) -> (Tensor out, Tensor lse)", _forward, _forward_fake, _autograd_backward, _setup_context)
_backward_op = Op(
    f"{OP}_backward(Tensor grad_out, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _no_second_derivative,
    lambda ctx, inputs, output: None,
)
