"""mask_tokens on a GPU, through csrc/mask_tokens/mask_tokens_cuda.cu: two launches, and with a capacity no waiting."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m4kernels import _cuda, _ext
from m4kernels.ops.mask_tokens.arguments import MaskArguments
from m4kernels.ops.mask_tokens.native import Inputs, Side, draw_arguments, fill, native_plan
from m4kernels.ops.mask_tokens.plan import Plan
from m4kernels.ops.mask_tokens.reference import check_lengths

_UNLIMITED = 2**62
_UNFIT = "mask_tokens: a length is out of range or the capacity too small"  # what a device assertion can say


def can_run(call: MaskArguments) -> str | None:
    """Specs that fit the kernels' tables and shared memory; csrc/mask_tokens/mask_tokens_block.h says why."""
    extension, lens = _ext.require(), call.plan.spec.max_seq_lens
    if len(lens) > extension.mask_block_modalities:
        return f"it takes up to {extension.mask_block_modalities} modalities, got {len(lens)}"
    if max(lens) > extension.mask_block_seq_len:
        return f"it takes modalities of up to {extension.mask_block_seq_len} tokens, got one of {max(lens)}"
    warp, most = extension.mask_block_warp, extension.mask_block_slots
    slots = sum(-(-n // warp) * warp for n in lens)
    if slots > most:
        return f"it takes samples of up to {most} tokens, each modality rounded up to {warp}, got {slots}"
    return None


def mask_tokens(call: MaskArguments) -> tuple[Tensor, ...]:
    """As `reference.mask_tokens`."""
    with _cuda.current_stream(call.device) as where:
        return _mask_tokens("cuda", where, call)


@functools.lru_cache(maxsize=64)
def _native(plan: Plan) -> Any:
    return native_plan(_ext.require().MaskBlockPlan, plan)  # the plan is this cache's key, so it lives as long


def _mask_tokens(target: str, where: dict[str, int], call: MaskArguments) -> tuple[Tensor, ...]:
    """The op on "cuda" with device and stream, or on "host", where tests run its programs, with order and threads."""
    extension, empty = _ext.require(), functools.partial(torch.empty, device=call.device)
    given, inputs, targets = Inputs.of(call), Side.empty(call, empty), Side.empty(call, empty)
    draw = draw_arguments(call, given, _native(call.plan)) | where
    totals, fits = empty(3, dtype=torch.int32), empty(1, dtype=torch.bool)
    limits = call.capacity or (_UNLIMITED, _UNLIMITED)
    getattr(extension, f"mask_tokens_draw_{target}")(
        **draw,
        input_counts=inputs.counts.data_ptr(),
        input_cu_seqlens=inputs.cu_seqlens.data_ptr(),
        input_size=limits[0],
        target_counts=targets.counts.data_ptr(),
        target_cu_seqlens=targets.cu_seqlens.data_ptr(),
        target_size=limits[1],
        totals=totals.data_ptr(),
        fits=fits.data_ptr(),
    )
    sizes: Sequence[int]
    if call.capacity is None:
        *sizes, bad = totals.tolist()  # waits for the device
        if bad:
            assert given.lengths is not None
            check_lengths(given.lengths.cpu(), call.plan.spec.max_seq_lens)  # raises
    else:
        sizes = call.capacity
        torch._assert_async(fits, _UNFIT)
    function = getattr(extension, f"mask_tokens_fill_{target}")
    return fill(function, given, (inputs, targets), sizes, empty, **draw, fits=fits.data_ptr())
