"""Random numbers that are a function of what they are for: the same whatever else is drawn, in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from m4kernels.ops.mask_tokens.reference import LOW32, philox4x32_10

_PURPOSE = 128 << 24  # of Philox' counter; masks and mirrored samples have other purposes
_STEP_BITS, _MOMENT_BITS = 20, 12
MAX_MOMENTS, MAX_STEPS = 1 << _MOMENT_BITS, 1 << _STEP_BITS


def uniforms(seed: int, sample_ids: Tensor, places: Tensor, *, step: int, moment: int = 0) -> tuple[Tensor, Tensor]:
    """Two independent uniform draws for every place of every sample.

    Args:
        seed: 0 … 2^64 - 1.
        sample_ids: int64 (B,).
        places: int64 (B, T), where in the row, below 2^24.
        step, moment: of decoding and of a roll-out, below MAX_STEPS and MAX_MOMENTS.
    Returns:
        float64 (B, T) in [0, 1), twice: the 53 leading bits of words 0 and 1, and of words 2 and 3, of the
        Philox4x32-10 block with the seed as key and the counter (128 · 2^24 + place, moment · 2^20 + step, sample id
        bits 0-31, sample id bits 32-63).
    """
    ids = sample_ids[:, None].expand_as(places)
    when = torch.full_like(places, (moment << _STEP_BITS) + step)
    counter = (places + _PURPOSE, when, ids & LOW32, (ids >> 32) & LOW32)
    words = philox4x32_10(counter, (seed & LOW32, (seed >> 32) & LOW32))
    first, second = (((high >> 5 << 26) + (low >> 6)).double() / 2**53 for high, low in (words[:2], words[2:]))
    return first, second
