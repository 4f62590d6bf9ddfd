"""mask_tokens on the CPU, through csrc/mask_tokens."""

import functools
from typing import Any

import torch
from torch import Tensor

from m4kernels import _ext
from m4kernels.dispatch import runs_always
from m4kernels.ops.mask_tokens.native import TOKEN_TYPES, native_plan, readable
from m4kernels.ops.mask_tokens.plan import Plan
from m4kernels.ops.mask_tokens.reference import Draw, bad_length, too_small
from m4kernels.segments import IGNORE_INDEX

can_run = runs_always


@functools.lru_cache(maxsize=64)
def _native(plan: Plan) -> Any:
    return native_plan(_ext.require().MaskPlan, plan)  # the plan is this cache's key, so it lives as long


def mask_tokens(
    tokens: Tensor,
    draw: Draw,
    lengths: Tensor | None,
    plan: Plan,
    capacity: tuple[int, int] | None,
) -> tuple[Tensor, ...]:
    """As `reference.mask_tokens`."""
    extension = _ext.require()
    batch, modalities = tokens.shape[0], plan.spec.num_modalities
    tokens, sample_ids, lengths = readable(tokens, draw, lengths)
    common = (
        _native(plan),
        draw.seed,
        draw.epoch,
        sample_ids.data_ptr(),
        batch,
        0 if lengths is None else lengths.data_ptr(),
        torch.get_num_threads(),
    )

    segments = [
        (torch.empty((batch, modalities), dtype=torch.int32), torch.empty(batch + 1, dtype=torch.int32)) for _ in "io"
    ]
    pointers = [(counts.data_ptr(), cu_seqlens.data_ptr()) for counts, cu_seqlens in segments]
    *totals, bad = extension.mask_tokens_count(*common, *pointers[0], *pointers[1])
    if bad >= 0:
        assert lengths is not None
        raise ValueError(bad_length(plan.spec.max_seq_lens, bad, int(lengths.view(-1)[bad])))
    sizes = capacity or totals
    for name, needed, given in zip(("input", "target"), totals, sizes, strict=True):
        if needed > given:
            raise ValueError(too_small(name, needed, given))

    packed = [tuple(torch.empty(size, dtype=torch.int64) for _ in range(3)) for size in sizes]
    sides = [
        (*pointers[i], *(x.data_ptr() for x in packed[i]), sizes[i], fill) for i, fill in enumerate((0, IGNORE_INDEX))
    ]
    extension.mask_tokens_fill(
        *common, tokens.data_ptr(), TOKEN_TYPES[tokens.dtype], tokens.stride(0), *sides[0], *sides[1]
    )
    (in_counts, in_cu), (out_counts, out_cu) = segments
    return (*packed[0], in_cu, in_counts, *packed[1], out_cu, out_counts)
