"""Cross-modal attention in plain PyTorch, one sample after another: the specification of every other backend.

On CUDA it waits for the device once a call, to learn where the samples are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from m4kernels._dtypes import compute_dtype
from m4kernels.backend import runs_always
from m4kernels.ops.cross_modal_attention.arguments import AttentionArguments, Gradients
from m4kernels.segments import Segments

can_run = runs_always


def cross_modal_attention(call: AttentionArguments) -> tuple[Tensor, Tensor]:
    """out (Tq, H, Dh) and lse (H, Tq), the logsumexp of the scaled scores of every row, -inf where it has no key."""
    q, k, v, q_segments, k_segments, allow, scale = call
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(call.lse_shape, -torch.inf, dtype=compute_dtype(q.dtype))
    for rows, keys, allowed in _samples(q_segments, k_segments, allow):
        _, values, scores = _scores(q[rows], k[keys], v[keys], allowed, scale)
        # Subtracting the largest score is exact; subtracting the rounded logsumexp would cost |lse| eps.
        exps = _exp_minus(scores, scores.amax(-1))
        total = exps.sum(-1, keepdim=True)
        weights = exps / total.masked_fill(total == 0, 1.0)
        out[rows] = torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2).to(out.dtype)
        lse[:, rows] = scores.logsumexp(-1).flatten(0, 1)
    return out, lse


def cross_modal_attention_backward(
    call: AttentionArguments,
    grad_out: Tensor,  # (Tq, H, Dh)
    _out: Tensor,  # (Tq, H, Dh)
    lse: Tensor,  # (H, Tq)
    grads: Gradients,
) -> None:
    """Writes the gradients of q, k and v, from P = exp(scores - lse), dP = dO Vᵀ, dS = P (dP - Σ P dP) scale."""
    q, k, v, q_segments, k_segments, allow, scale = call
    grad_q, grad_k, grad_v = (grad.zero_() for grad in grads)
    groups = k.shape[1]
    for rows, keys, allowed in _samples(q_segments, k_segments, allow):
        queries, values, scores = _scores(q[rows], k[keys], v[keys], allowed, scale)
        weights = _exp_minus(scores, lse[:, rows].unflatten(0, (groups, -1)))
        of_out = grad_out[rows].to(scores.dtype).unflatten(1, (groups, -1))
        grad_weights = torch.einsum("qhgd,khd->hgqk", of_out, values)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        grad_q[rows] = torch.einsum("hgqk,khd->qhgd", grad_scores, k[keys].to(scores.dtype)).flatten(1, 2).to(q.dtype)
        grad_k[keys] = torch.einsum("hgqk,qhgd->khd", grad_scores, queries).to(k.dtype)
        grad_v[keys] = torch.einsum("hgqk,qhgd->khd", weights, of_out).to(v.dtype)


def _samples(
    q_segments: Segments, k_segments: Segments, allow: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(its rows, its keys, bool (rows, keys) or None for all) of every sample that has both."""
    q_starts, k_starts = q_segments.cu_seqlens.tolist(), k_segments.cu_seqlens.tolist()
    modalities = torch.arange(q_segments.num_modalities, device=q_segments.counts.device)
    for b in range(q_segments.batch_size):
        rows, keys = slice(q_starts[b], q_starts[b + 1]), slice(k_starts[b], k_starts[b + 1])
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        if allow is None:
            yield rows, keys, None
            continue
        row_modality = modalities.repeat_interleave(q_segments.counts[b])
        key_modality = modalities.repeat_interleave(k_segments.counts[b])
        yield rows, keys, allow[row_modality[:, None], key_modality]


def _scores(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """One sample's (queries (n, Hkv, G, Dh), values (m, Hkv, Dh), scaled and masked scores (Hkv, G, n, m))."""
    dtype = compute_dtype(q.dtype)
    queries = q.to(dtype).unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("qhgd,khd->hgqk", queries, k.to(dtype)) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return queries, v.to(dtype), scores


def _exp_minus(scores: Tensor, shift: Tensor) -> Tensor:
    """exp(scores - shift of the row), 0 throughout a row without keys, whose shift is -inf."""
    return torch.exp(scores - shift.masked_fill(shift == -torch.inf, 0.0).unsqueeze(-1))
