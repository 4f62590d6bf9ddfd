"""Peers that may be absent: from a newer torch, or from packages of their own."""

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.device import Unavailable
from m4kernels import Segments


def _module(name: str, package: str) -> Any:
    """An optional module; only its absence is a reason to skip, a broken one is an error."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise
        raise Unavailable(f"{package} is not installed") from None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn: FlashAttention over packed samples, in bfloat16 on a GPU."""
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen")
    except ModuleNotFoundError:
        raise Unavailable("this torch has no torch.nn.attention.varlen (2.10 has)") from None
    ends = q_segments.cu_seqlens, k_segments.cu_seqlens
    return varlen.varlen_attn(q, k, v, *ends, q_segments.max_seqlen, k_segments.max_seqlen)


def torch_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """F.linear_cross_entropy of torch 2.13."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no F.linear_cross_entropy (2.13 has)")
    return F.linear_cross_entropy(x, weight, targets)


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy."""
    return _module("liger_kernel.transformers", "liger-kernel").LigerFusedLinearCrossEntropyLoss()(weight, x, targets)


def cce(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cut cross-entropy with its defaults, which leave out gradients that bfloat16 would round to nothing."""
    return _module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy(x, weight, targets)
