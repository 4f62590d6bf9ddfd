"""cross_modal_attention on the CPU, through csrc/cross_modal_attention."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from m4kernels import _ext
from m4kernels.segments import Segments


def can_run(q: Tensor, *_args: object) -> str | None:
    """float32, and bfloat16 and float16 computed in float32."""
    return "it computes in float32, got torch.float64 tensors" if q.dtype == torch.float64 else None


def cross_modal_attention(
    q: Tensor,  # (Tq, H, Dh)
    k: Tensor,  # (Tk, Hkv, Dh)
    v: Tensor,  # (Tk, Hkv, Dh)
    q_segments: Segments,
    k_segments: Segments,
    allow: Tensor | None,  # (M, M)
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (Tq, H, Dh) and lse (H, Tq)."""
    dtype = q.dtype
    q, k, v = (_readable(x) for x in (q, k, v))
    extension, plan, shape = _prepare(q, k, q_segments, k_segments, allow, scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    step, _ = plan.workspace(q.shape[2])
    workspace = torch.empty(shape[-1] * step, dtype=torch.float32)
    in_f32 = q.dtype == torch.float32
    kernel = extension.cross_modal_attention_f32 if in_f32 else extension.cross_modal_attention_bf16
    kernel(plan, shape, *map(_view, (q, k, v, out)), lse.data_ptr(), workspace.data_ptr(), step)
    return out.to(dtype), lse


def cross_modal_attention_backward(
    grad_out: Tensor,  # (Tq, H, Dh)
    q: Tensor,  # (Tq, H, Dh)
    k: Tensor,  # (Tk, Hkv, Dh)
    v: Tensor,  # (Tk, Hkv, Dh)
    _out: Tensor,  # (Tq, H, Dh)
    lse: Tensor,  # (H, Tq)
    q_segments: Segments,
    k_segments: Segments,
    allow: Tensor | None,  # (M, M)
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k and v; `out` is not needed, since whole rows of scores are at hand."""
    dtype = q.dtype
    grad_out, q, k, v = (_readable(x) for x in (grad_out, q, k, v))
    lse = lse.contiguous()
    extension, plan, shape = _prepare(q, k, q_segments, k_segments, allow, scale)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=q.dtype) for x in (q, k, v))
    _, step = plan.workspace(q.shape[2])
    workspace = torch.empty(shape[-1] * step, dtype=torch.float32)
    in_f32 = q.dtype == torch.float32
    kernel = extension.cross_modal_attention_backward_f32 if in_f32 else extension.cross_modal_attention_backward_bf16
    inputs, grads = map(_view, (grad_out, q, k, v)), map(_view, (grad_q, grad_k, grad_v))
    kernel(plan, shape, *inputs, lse.data_ptr(), *grads, workspace.data_ptr(), step)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: float32 or bfloat16, any steps between tokens and heads, none within a head."""
    if x.dtype == torch.float16:
        x = x.to(torch.float32)
    return x if x.stride(2) == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _prepare(
    q: Tensor, k: Tensor, q_segments: Segments, k_segments: Segments, allow: Tensor | None, scale: float
) -> tuple[ModuleType, Any, tuple[int, int, int, int, int, float, int]]:
    """The extension, the call's plan and its shape."""
    extension = _ext.require()
    q_cu_seqlens, k_cu_seqlens = q_segments.cu_seqlens.contiguous(), k_segments.cu_seqlens.contiguous()
    q_counts, k_counts = q_segments.counts.contiguous(), k_segments.counts.contiguous()
    allow = None if allow is None else allow.contiguous()
    plan = extension.AttentionPlan(
        q_cu_seqlens.data_ptr(),
        q_counts.data_ptr(),
        k_cu_seqlens.data_ptr(),
        k_counts.data_ptr(),
        0 if allow is None else allow.data_ptr(),
        q_segments.batch_size,
        q_segments.num_modalities,
    )
    shape = (q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], scale, torch.get_num_threads())
    return extension, plan, shape
