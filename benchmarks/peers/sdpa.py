"""PyTorch's scaled_dot_product_attention over ragged batches: padded with a dense mask, or one sample at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m4.model.padded import attend, dense_mask
from m4kernels import Segments


def slots(segments: Segments) -> Tensor:
    """int64 (T,): the place of each packed token in (B, max_seqlen), flattened."""
    total = int(segments.cu_seqlens[-1])
    sample = segments.sample_of_token(total)
    return sample * segments.max_seqlen + torch.arange(total, device=sample.device) - segments.cu_seqlens[sample]


def pad(x: Tensor, segments: Segments) -> Tensor:
    """Packed (T, ...) → padded (B, max_seqlen, ...), 0 in the padding."""
    out = x.new_zeros(segments.batch_size * segments.max_seqlen, *x.shape[1:])
    out[slots(segments)] = x[: int(segments.cu_seqlens[-1])]
    return out.unflatten(0, (segments.batch_size, segments.max_seqlen))


def modalities(segments: Segments) -> Tensor:
    """int64 (T,): the modality of each packed token."""
    index = torch.arange(segments.num_modalities, device=segments.counts.device).repeat(segments.batch_size)
    return index.repeat_interleave(segments.counts.flatten())


def padded_mask(q_segments: Segments, k_segments: Segments, allow: Tensor | None) -> Tensor:
    """bool (B, 1, Nq, Nk), True where the query may attend to the key."""
    valid = pad(
        torch.ones(int(k_segments.cu_seqlens[-1]), dtype=torch.bool, device=k_segments.counts.device), k_segments
    )
    q_mods, k_mods = (pad(modalities(s), s) for s in (q_segments, k_segments))
    return dense_mask(valid, q_mods, k_mods, allow)


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, Nq, H, Dh), k and v (B, Nk, H, Dh) → (B, Nq, H Dh)."""
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, matmul=False)


def by_sample(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Sequence[int], k_ends: Sequence[int], masks: Sequence[Tensor | None]
) -> Tensor:
    """Packed q (Tq, H, Dh), k and v (Tk, H, Dh), each sample on its own → (Tq, H, Dh); samples are not empty."""
    outs = []
    for b, mask in enumerate(masks):
        rows, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        heads_first = q[rows].transpose(0, 1), k[keys].transpose(0, 1), v[keys].transpose(0, 1)
        out = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2], attn_mask=mask)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)
