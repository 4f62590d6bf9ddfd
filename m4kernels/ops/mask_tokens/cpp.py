"""mask_tokens on the CPU, through csrc/mask_tokens."""

import functools
from typing import Any

import torch
from torch import Tensor

from m4kernels import _ext
from m4kernels.backend import runs_always
from m4kernels.ops.mask_tokens.arguments import MaskArguments
from m4kernels.ops.mask_tokens.native import Inputs, Side, draw_arguments, fill, native_plan
from m4kernels.ops.mask_tokens.plan import Plan
from m4kernels.ops.mask_tokens.reference import bad_length, too_small

can_run = runs_always


@functools.lru_cache(maxsize=64)
def _native(plan: Plan) -> Any:
    return native_plan(_ext.require().MaskPlan, plan)  # the plan is this cache's key, so it lives as long


def mask_tokens(call: MaskArguments) -> tuple[Tensor, ...]:
    """As `reference.mask_tokens`."""
    extension, lens = _ext.require(), call.plan.spec.max_seq_lens
    given, inputs, targets = Inputs.of(call), Side.empty(call, torch.empty), Side.empty(call, torch.empty)
    draw = draw_arguments(call, given, _native(call.plan))
    threads = torch.get_num_threads()
    *totals, bad = extension.mask_tokens_count(
        **draw,
        threads=threads,
        input_counts=inputs.counts.data_ptr(),
        input_cu_seqlens=inputs.cu_seqlens.data_ptr(),
        target_counts=targets.counts.data_ptr(),
        target_cu_seqlens=targets.cu_seqlens.data_ptr(),
    )
    if bad >= 0:
        assert given.lengths is not None
        raise ValueError(bad_length(lens, bad, int(given.lengths.view(-1)[bad])))
    sizes = call.capacity or totals
    for name, needed, size in zip(("input", "target"), totals, sizes, strict=True):
        if needed > size:
            raise ValueError(too_small(name, needed, size))
    function = extension.mask_tokens_fill
    return fill(function, given, (inputs, targets), sizes, torch.empty, **draw, threads=threads)
