"""cross_modal_attention for fused projections: the backward pass writes the gradient of the projection itself.

Of q, k and v that are views of one tensor, autograd gets three gradients and joins them: a copy of the whole, read and
written once more. Here the kernels write into views of one gradient.
"""

from typing import Any

from torch import Tensor

from m4kernels.ops.cross_modal_attention.api import OPTIONS, SEGMENTS, parts_of, register, scale_of
from m4kernels.ops.cross_modal_attention.arguments import OP, AttentionArguments, Names
from m4kernels.segments import Segments

QKV = Names(f"{OP}_qkvpacked", "qkv", "qkv", "qkv", "segments", "segments")
KV = Names(f"{OP}_kvpacked", "q", "kv", "kv")


def cross_modal_attention_qkvpacked(
    qkv: Tensor,  # (T, 3, H, Dh)
    segments: Segments,
    *,
    allow: Tensor | None = None,  # (M, M)
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention of a fused projection: `cross_modal_attention(*qkv.unbind(1), segments, segments)`, same bits.

    The gradient of qkv is one tensor that the backward pass writes in place, where autograd would stack those of q, k
    and v.

    Args:
        qkv: queries, keys and values of all samples, such as `F.linear(x, weight).unflatten(-1, (3, H, Dh))`; dtypes
            as in `cross_modal_attention`.
        segments: where each sample and modality lies in qkv.
        allow: as in `cross_modal_attention`.
        scale: as in `cross_modal_attention`.
        backend: as in `cross_modal_attention`.

    Returns:
        (T, H, Dh) of the dtype of qkv, contiguous.

    Raises:
        ValueError: as in `cross_modal_attention`.
    """
    parts = parts_of(f"{QKV.op}: segments", segments)
    return _qkv_op(qkv, *parts, allow, scale_of(QKV.op, scale), backend or "")[0]


def cross_modal_attention_kvpacked(
    q: Tensor,  # (Tq, H, Dh)
    kv: Tensor,  # (Tk, 2, Hkv, Dh)
    q_segments: Segments,
    k_segments: Segments,
    *,
    allow: Tensor | None = None,  # (M, M)
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention to a fused projection: `cross_modal_attention(q, *kv.unbind(1), q_segments, k_segments)`, same bits.

    The gradient of kv is one tensor that the backward pass writes in place, where autograd would stack those of k and
    v.

    Args:
        q: queries, as in `cross_modal_attention`.
        kv: keys and values of all samples, such as `F.linear(context, weight).unflatten(-1, (2, Hkv, Dh))`; of the
            dtype of q; H must be a multiple of Hkv.
        q_segments: where each sample and modality lies in q.
        k_segments: where each sample and modality lies in kv; the same B and M.
        allow: as in `cross_modal_attention`.
        scale: as in `cross_modal_attention`.
        backend: as in `cross_modal_attention`.

    Returns:
        (Tq, H, Dh) of the dtype of q, contiguous.

    Raises:
        ValueError: as in `cross_modal_attention`.
    """
    q_parts, k_parts = parts_of(f"{KV.op}: q_segments", q_segments), parts_of(f"{KV.op}: k_segments", k_segments)
    return _kv_op(q, kv, *q_parts, *k_parts, allow, scale_of(KV.op, scale), backend or "")[0]


class _QkvArguments(AttentionArguments):
    @property
    def names(self) -> Names:
        return QKV


class _KvArguments(AttentionArguments):
    @property
    def names(self) -> Names:
        return KV


def _in_qkv(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.unbind(1)


def _in_kv(q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
    return (q, *kv.unbind(1))


def _qkv_call(qkv: Tensor, cu_seqlens: Tensor, counts: Tensor, max_seqlen: int, *options: Any) -> AttentionArguments:
    _check_shape(f"{QKV.op}: qkv", qkv, 3)
    q, k, v = _in_qkv(qkv)
    parts = (cu_seqlens, counts, max_seqlen)
    return _QkvArguments.from_flat(q, k, v, *parts, *parts, *options)


def _kv_call(q: Tensor, kv: Tensor, *others: Any) -> AttentionArguments:
    _check_shape(f"{KV.op}: kv", kv, 2)
    q, k, v = _in_kv(q, kv)
    return _KvArguments.from_flat(q, k, v, *others)


def _check_shape(name: str, x: Tensor, packed: int) -> None:
    if x.dim() != 4 or x.shape[1] != packed or 0 in x.shape[2:]:
        raise ValueError(f"{name} must have shape (tokens, {packed}, heads, head_dim), got {tuple(x.shape)}")


_qkv_op = register(QKV.op, f"Tensor qkv, {SEGMENTS.format('')}, {OPTIONS}", leaves=1, views=_in_qkv, call_of=_qkv_call)
_kv_op = register(
    KV.op,
    f"Tensor q, Tensor kv, {SEGMENTS.format('q_')}, {SEGMENTS.format('k_')}, {OPTIONS}",
    leaves=2,
    views=_in_kv,
    call_of=_kv_call,
)
