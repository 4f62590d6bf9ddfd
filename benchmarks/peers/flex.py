"""PyTorch's FlexAttention over one packed sequence with a block mask; on a CPU it only runs forward."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.peers.sdpa import modalities
from m4kernels import Segments


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def block_mask(q_segments: Segments, k_segments: Segments, allow: Tensor | None) -> BlockMask:
    """Same sample, and an allowed pair of modalities."""
    q_total, k_total = int(q_segments.cu_seqlens[-1]), int(k_segments.cu_seqlens[-1])
    q_sample, k_sample = q_segments.sample_of_token(q_total), k_segments.sample_of_token(k_total)
    q_mods, k_mods = modalities(q_segments), modalities(k_segments)
    count = q_segments.num_modalities
    device = q_segments.counts.device
    allowed = torch.ones(count, count, dtype=torch.bool, device=device) if allow is None else allow

    def mask_mod(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q_sample[q] == k_sample[k]) & allowed[q_mods[q], k_mods[k]]

    return create_block_mask(mask_mod, None, None, q_total, k_total, device=device.type)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Packed q (Tq, H, Dh), k and v (Tk, H, Dh) → (H, Tq, Dh)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v))
    return _compiled()(q, k, v, block_mask=mask)[0]
