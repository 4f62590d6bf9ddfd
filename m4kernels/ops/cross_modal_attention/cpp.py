"""cross_modal_attention on the CPU, through csrc/cross_modal_attention."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from m4kernels import _ext
from m4kernels.ops.cross_modal_attention.arguments import OP, AttentionArguments, Gradients


def can_run(call: AttentionArguments) -> str | None:
    """float32, and bfloat16 and float16 computed in float32."""
    return "it computes in float32, got torch.float64 tensors" if call.q.dtype == torch.float64 else None


def cross_modal_attention(call: AttentionArguments) -> tuple[Tensor, Tensor]:
    """out (Tq, H, Dh) and lse (H, Tq)."""
    q, k, v = (_readable(x) for x in call[:3])
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(call.lse_shape, dtype=torch.float32)
    _run(OP, 0, call, q, q=_view(q), k=_view(k), v=_view(v), out=_view(out), lse=lse.data_ptr())
    return out.to(call.q.dtype), lse


def cross_modal_attention_backward(
    call: AttentionArguments,
    grad_out: Tensor,  # (Tq, H, Dh)
    _out: Tensor,  # (Tq, H, Dh)
    lse: Tensor,  # (H, Tq)
    grads: Gradients,
) -> None:
    """Writes the gradients with respect to q, k and v; `out` is not needed, since whole rows of scores are at hand."""
    grad_out, q, k, v = (_readable(x) for x in (grad_out, *call[:3]))
    lse = lse.contiguous()
    written = [x if x.dtype == q.dtype else torch.empty(x.shape, dtype=q.dtype) for x in grads]
    grad_q, grad_k, grad_v = written
    _run(
        f"{OP}_backward",
        1,
        call,
        q,
        grad_out=_view(grad_out),
        q=_view(q),
        k=_view(k),
        v=_view(v),
        lse=lse.data_ptr(),
        grad_q=_view(grad_q),
        grad_k=_view(grad_k),
        grad_v=_view(grad_v),
    )
    for grad, computed in zip(grads, written, strict=True):
        if computed is not grad:  # float16
            grad.copy_(computed)


def _run(function: str, direction: int, call: AttentionArguments, queries: Tensor, **tensors: Any) -> None:
    """Run the extension's function for queries as the kernels read them; direction 0 forward, 1 backward."""
    threads = torch.get_num_threads()
    extension, plan, shape = _prepare(call, threads)
    step = plan.workspace(queries.shape[2])[direction]
    workspace = torch.empty(threads * step, dtype=torch.float32)
    kernel = getattr(extension, f"{function}_{'f32' if queries.dtype == torch.float32 else 'bf16'}")
    kernel(plan=plan, **shape, **tensors, workspace=workspace.data_ptr(), workspace_step=step)


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: float32 or bfloat16, any steps between tokens and heads, none within a head."""
    if x.dtype == torch.float16:
        x = x.to(torch.float32)
    return x if x.stride(2) == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int]:
    """Address; elements from token to token, from head to head."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def _prepare(call: AttentionArguments, threads: int) -> tuple[ModuleType, Any, dict[str, Any]]:
    """The extension, the call's plan and its shape."""
    extension = _ext.require()
    q, k, _, q_segments, k_segments, allow, scale = call
    q_cu_seqlens, k_cu_seqlens = q_segments.cu_seqlens.contiguous(), k_segments.cu_seqlens.contiguous()
    q_counts, k_counts = q_segments.counts.contiguous(), k_segments.counts.contiguous()
    allow = None if allow is None else allow.contiguous()
    plan = extension.attention_plan(
        q_cu_seqlens=q_cu_seqlens.data_ptr(),
        q_counts=q_counts.data_ptr(),
        k_cu_seqlens=k_cu_seqlens.data_ptr(),
        k_counts=k_counts.data_ptr(),
        allow=0 if allow is None else allow.data_ptr(),
        batch=q_segments.batch_size,
        modalities=q_segments.num_modalities,
    )
    (q_tokens, q_heads, head_dim), (k_tokens, kv_heads, _) = q.shape, k.shape
    shape = {
        "q_tokens": q_tokens,
        "k_tokens": k_tokens,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "scale": scale,
        "threads": threads,
    }
    return extension, plan, shape
