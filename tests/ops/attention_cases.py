"""Inputs, truth and comparison shared by the tests of cross_modal_attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m4kernels import (
    Segments,
    cross_modal_attention,
    cross_modal_attention_kvpacked,
    cross_modal_attention_qkvpacked,
)
from m4kernels.testing import assert_within_error_budget


class Kernel(NamedTuple):
    """A backend and the device that it is tested on."""

    backend: str
    device: str


EYE = torch.eye(4, dtype=torch.bool)
ALLOW = {
    "full": None,
    "within": EYE,
    "none": torch.zeros(4, 4, dtype=torch.bool),
    "causal": torch.ones(4, 4, dtype=torch.bool).tril(),
    "one empty row, one empty column": torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1]]).bool(),
    "cross": ~EYE,
}


def attended(q: Tensor, k: Tensor, q_seg: Segments, k_seg: Segments, allow: Tensor | None) -> Tensor:
    """bool (Tq, Tk): which keys every query attends to; written without the packed loop."""

    def labels(segments: Segments, total: int, outside: int) -> tuple[Tensor, Tensor]:
        samples, modalities = segments.counts.shape
        sample = torch.full((total,), outside)
        modality = torch.zeros(total, dtype=torch.int64)
        flat = segments.counts.flatten().long().cpu()
        n = int(flat.sum())
        sample[:n] = torch.arange(samples).repeat_interleave(modalities).repeat_interleave(flat)
        modality[:n] = torch.arange(modalities).repeat(samples).repeat_interleave(flat)
        return sample.to(q.device), modality.to(q.device)

    q_sample, q_modality = labels(q_seg, q.shape[0], -1)
    k_sample, k_modality = labels(k_seg, k.shape[0], -2)
    mask = q_sample[:, None] == k_sample
    return mask if allow is None else mask & allow[q_modality][:, k_modality]


def dense(
    q: Tensor, k: Tensor, v: Tensor, q_seg: Segments, k_seg: Segments, allow: Tensor | None, scale: float | None
) -> Tensor:
    """The whole (Tq, Tk) score matrix with one mask, differentiable."""
    mask = attended(q, k, q_seg, k_seg, allow)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), keys) * (q.shape[2] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask, -1e30).softmax(-1) * mask
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def rounding_of_recomputation(
    tensors: list[Tensor], q_seg: Segments, k_seg: Segments, allow: Tensor | None, scale: float | None
) -> tuple[float | Tensor, ...]:
    """What the backward pass of any kernel that keeps no weights may err beyond plain PyTorch, in out, dq, dk and dv.

    Plain PyTorch keeps its weights P, whose rows add up to 1, and takes Σ P dP of the very dP that it then subtracts
    it from. Where a row has one key, or one that outweighs the rest, both make it exact: P is 1 and dS is 0. The
    kernels compute P and dS anew, so there its error says nothing about theirs. With u the rounding of the sums (half
    an eps) and first-order terms only, their own roundings are

    - P = exp(s - lse): s is summed again, in another order than the s that lse was made of, and lse is stored rounded.
      Each of the three is off by about u |s|, none by what the others are: P is off by a factor of 1 ± 2 u max|s|.
    - dS = scale P (dP - delta) with dP = Σ v dO and delta = Σ out dO over the head: these sums err by about u Σ|v dO|
      and u Σ|out dO| (a rounded `out` by as much, in its own dtype), whatever remains of their difference. So dS is
      off by 2 u max|s| |dS| from P, and by scale P u (Σ|v dO| + Σ|out dO|).

    dv = Pᵀ dO, dq = dS k and dk = dSᵀ q pass these on, entry by entry, with the absolute values of what multiplies
    them. Sums of many products err by more than one u, thus eps = 2 u in both places. The largest seen, with OpenBLAS's
    kernels for Haswell under the interpreter, were 0.6 of the first (dv, scores of 39) and 0.8 of the second (one key).
    """
    q, k, v, grad = (x.double() for x in tensors)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    keys, values = (x.repeat_interleave(heads[1], 1) for x in (k, v))
    mask = attended(q, k, q_seg, k_seg, allow)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    weights = scores.masked_fill(~mask, -1e30).softmax(-1) * mask
    out = torch.einsum("hqk,khd->qhd", weights, values)
    grad_weights = torch.einsum("qhd,khd->hqk", grad, values)
    delta, delta_size = ((x * y).sum(-1).T.unsqueeze(-1) for x, y in ((out, grad), (out.abs(), grad.abs())))
    grad_weights_size = torch.einsum("qhd,khd->hqk", grad.abs(), values.abs())
    eps = torch.finfo(tensors[0].dtype).eps
    weight_error = min(eps, torch.finfo(torch.float32).eps) * (scores * mask).abs().amax()
    grad_score_error = weight_error * (grad_weights - delta).abs() + eps * (grad_weights_size + delta_size)
    grad_score_error = abs(scale) * weights * grad_score_error
    dq = torch.einsum("hqk,khd->qhd", grad_score_error, keys.abs())
    dk = torch.einsum("hqk,qhd->khd", grad_score_error, q.abs())
    dv = weight_error * torch.einsum("hqk,qhd->khd", weights, grad.abs())
    return 0.0, dq, dk.unflatten(1, heads).sum(2), dv.unflatten(1, heads).sum(2)


def case(
    counts: Tensor,
    k_counts: Tensor | None = None,
    *,
    heads: tuple[int, int] = (2, 2),
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    tails: tuple[int, int] = (0, 0),
    seed: int = 0,
    device: str = "cpu",
) -> tuple[list[Tensor], Segments, Segments]:
    """([q, k, v, grad_out], q_segments, k_segments); q, k and v are views with foreign strides."""
    g = torch.Generator().manual_seed(seed)
    q_seg = Segments.from_counts(counts).to(device)
    k_seg = q_seg if k_counts is None else Segments.from_counts(k_counts).to(device)
    tq, tk = (int(s.cu_seqlens[-1]) + tail for s, tail in zip((q_seg, k_seg), tails, strict=True))
    q = torch.randn(tq, heads[0] + 1, dim, generator=g, dtype=torch.float64).to(device, dtype)[:, 1:]
    kv = torch.randn(tk, 2, heads[1], dim, generator=g, dtype=torch.float64).to(device, dtype)
    grad = torch.randn(tq, heads[0], dim, generator=g, dtype=torch.float64).to(device, dtype)
    return [q, kv[:, 0], kv[:, 1], grad], q_seg, k_seg


def qkvpacked(q: Tensor, k: Tensor, v: Tensor, q_seg: Segments, _k_seg: Segments, **options: Any) -> Tensor:
    """`cross_modal_attention` through one tensor of all three."""
    return cross_modal_attention_qkvpacked(torch.stack((q, k, v), 1), q_seg, **options)


def kvpacked(q: Tensor, k: Tensor, v: Tensor, q_seg: Segments, k_seg: Segments, **options: Any) -> Tensor:
    """`cross_modal_attention` through one tensor of keys and values."""
    return cross_modal_attention_kvpacked(q, torch.stack((k, v), 1), q_seg, k_seg, **options)


def run(function: Any, tensors: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """[out, dq, dk, dv]"""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, *args, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(
    kernel: Kernel,
    tensors: list[Tensor],
    q_seg: Segments,
    k_seg: Segments,
    allow: Tensor | None,
    scale: float | None,
    function: Any = cross_modal_attention,
) -> list[Tensor]:
    """Forward and backward against the dense float64 truth; plain PyTorch in the same dtype sets the budget, and what a
    kernel recomputes adds to it."""
    allow = None if allow is None else allow.to(tensors[0].device)
    truth = run(dense, [x.double() for x in tensors], q_seg, k_seg, allow, scale)
    plain = run(dense, tensors, q_seg, k_seg, allow, scale)
    actual = run(function, tensors, q_seg, k_seg, allow=allow, scale=scale, backend=kernel.backend)
    further = rounding_of_recomputation(tensors, q_seg, k_seg, allow, scale)
    for name, a, p, t, more in zip(("out", "dq", "dk", "dv"), actual, plain, truth, further, strict=True):
        assert_within_error_budget(a, p, t, further=more, what=name)
        assert a.is_contiguous() or function is not cross_modal_attention
    return actual


class Made(TorchDispatchMode):
    """The operators that run under it, with the sizes of what they make anew."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.sizes.append((func._schema.name, x.numel()))
        return result
