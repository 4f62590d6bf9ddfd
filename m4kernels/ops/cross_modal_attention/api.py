"""Public function cross_modal_attention and its registration with torch.library."""

from typing import Any

import torch
from torch import Tensor

from m4kernels._dtypes import compute_dtype
from m4kernels._library import Op
from m4kernels.dispatch import Dispatcher
from m4kernels.segments import Segments

OP = "cross_modal_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

dispatcher = Dispatcher(OP, ("triton", "cpp", "reference"))


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
            TRITON_INTERPRET=1 set), "cpp" (CPU; not float64) or "reference"; default the fastest that can run.

    Returns:
        (Tq, H, Dh) of the dtype of q, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit, or, for CPU tensors, the values of the segments are
            inconsistent or do not lie within q and k; the message names the argument.
    """
    q_parts = (q_segments.cu_seqlens, q_segments.counts, q_segments.max_seqlen)
    k_parts = (k_segments.cu_seqlens, k_segments.counts, k_segments.max_seqlen)
    return _op(q, k, v, *q_parts, *k_parts, allow, scale, backend or "")[0]


def _check(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, allow: Tensor | None) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit; reads no values."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"{OP}: {name} must have shape (tokens, heads, head_dim), got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{OP}: {name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{OP}: {name} must be on the device of q, {q.device}, got {x.device}")
    if q.dtype not in DTYPES:
        raise ValueError(f"{OP}: q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{OP}: k must have the head_dim of q, {q.shape[2]}, got {k.shape[2]}")
    if v.shape != k.shape:
        raise ValueError(f"{OP}: v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{OP}: the heads of q must be a multiple of those of k, {k.shape[1]}, got {q.shape[1]}")
    for name, segments in (("q_segments", q_segments), ("k_segments", k_segments)):
        segments.check_structure(f"{OP}: {name}")
        if segments.counts.device != q.device:
            raise ValueError(f"{OP}: {name} must be on the device of q, {q.device}, got {segments.counts.device}")
    if q_segments.counts.shape != k_segments.counts.shape:
        raise ValueError(
            f"{OP}: k_segments.counts must have the shape (B, M) of q_segments.counts, "
            f"{tuple(q_segments.counts.shape)}, got {tuple(k_segments.counts.shape)}"
        )
    if allow is None:
        return
    modalities = q_segments.num_modalities
    if allow.dtype != torch.bool or allow.shape != (modalities, modalities):
        raise ValueError(
            f"{OP}: allow must be bool ({modalities}, {modalities}), got {allow.dtype} {tuple(allow.shape)}"
        )
    if allow.device != q.device:
        raise ValueError(f"{OP}: allow must be on the device of q, {q.device}, got {allow.device}")


def _check_grad(grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
    for name, x in (("grad_out", grad_out), ("out", out)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{OP}: {name} must be {q.dtype} {tuple(q.shape)} on {q.device}, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    shape, dtype = (q.shape[1], q.shape[0]), compute_dtype(q.dtype)
    if lse.shape != shape or lse.dtype != dtype or lse.device != q.device:
        raise ValueError(
            f"{OP}: lse must be {dtype} {shape} on {q.device}, got {lse.dtype} {tuple(lse.shape)} on {lse.device}"
        )


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cu_seqlens: Tensor,
    q_counts: Tensor,
    q_max_seqlen: int,
    k_cu_seqlens: Tensor,
    k_counts: Tensor,
    k_max_seqlen: int,
    allow: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Segments, Segments, Tensor | None, float]:
    """The op's arguments as the backends take them, checked as far as that needs no values."""
    q_segments = Segments(q_cu_seqlens, q_counts, q_max_seqlen)
    k_segments = Segments(k_cu_seqlens, k_counts, k_max_seqlen)
    _check(q, k, v, q_segments, k_segments, allow)
    return q, k, v, q_segments, k_segments, allow, q.shape[2] ** -0.5 if scale is None else scale


def _check_values(q: Tensor, k: Tensor, q_segments: Segments, k_segments: Segments) -> None:
    if q.device.type == "cpu":
        q_segments.check_values(f"{OP}: q_segments", q.shape[0])
        k_segments.check_values(f"{OP}: k_segments", k.shape[0])


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = args
    call = _inputs(*inputs)
    module = dispatcher.select(backend, *call)
    _check_values(call[0], call[1], call[3], call[4])
    return module.cross_modal_attention(*call)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q = _inputs(*args[:-1])[0]
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))


def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = args
    call = _inputs(*inputs)
    q, k, v, q_segments, k_segments, allow, scale = call
    _check_grad(grad_out, q, out, lse)
    module = dispatcher.select(backend, *call)
    _check_values(q, k, q_segments, k_segments)
    return module.cross_modal_attention_backward(grad_out, q, k, v, out, lse, q_segments, k_segments, allow, scale)


def _backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, *_ = _inputs(*args[:-1])
    _check_grad(grad_out, q, out, lse)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_cu_seqlens, q_counts, ctx.q_max_seqlen, k_cu_seqlens, k_counts, ctx.k_max_seqlen, allow = inputs[:10]
    ctx.scale, ctx.backend = inputs[10:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v, q_cu_seqlens, q_counts, k_cu_seqlens, k_counts, allow)


def _autograd_backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, q, k, v, q_cu_seqlens, q_counts, k_cu_seqlens, k_counts, allow = ctx.saved_tensors
    q_parts = (q_cu_seqlens, q_counts, ctx.q_max_seqlen)
    k_parts = (k_cu_seqlens, k_counts, ctx.k_max_seqlen)
    grads = _backward_op(grad_out, out, lse, q, k, v, *q_parts, *k_parts, allow, ctx.scale, ctx.backend)
    return *grads, *(None,) * 9


def _no_second_derivative(_ctx: Any, *_grads: Tensor) -> None:
    raise NotImplementedError(f"{OP}: the second derivative is not implemented")


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
