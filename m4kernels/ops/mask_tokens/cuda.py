"""mask_tokens on a GPU, through csrc/mask_tokens/mask_tokens_cuda.cu: two launches, and with a capacity no waiting."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m4kernels import _cuda, _ext
from m4kernels.ops.mask_tokens.native import TOKEN_TYPES, native_plan, readable
from m4kernels.ops.mask_tokens.plan import Plan
from m4kernels.ops.mask_tokens.reference import Draw, check_lengths
from m4kernels.segments import IGNORE_INDEX

_UNLIMITED = 2**62
_UNFIT = "mask_tokens: a length is out of range or the capacity too small"  # what a device assertion can say


def can_run(
    _tokens: Tensor, _draw: Draw, _lengths: Tensor | None, plan: Plan, _capacity: tuple[int, int] | None
) -> str | None:
    """Specs that fit the kernels' tables and shared memory; csrc/mask_tokens/mask_tokens_block.h says why."""
    extension, lens = _ext.require(), plan.spec.max_seq_lens
    if len(lens) > extension.mask_block_modalities:
        return f"it takes up to {extension.mask_block_modalities} modalities, got {len(lens)}"
    if max(lens) > extension.mask_block_seq_len:
        return f"it takes modalities of up to {extension.mask_block_seq_len} tokens, got one of {max(lens)}"
    warp, most = extension.mask_block_warp, extension.mask_block_slots
    slots = sum(-(-n // warp) * warp for n in lens)
    if slots > most:
        return f"it takes samples of up to {most} tokens, each modality rounded up to {warp}, got {slots}"
    return None


def mask_tokens(
    tokens: Tensor,
    draw: Draw,
    lengths: Tensor | None,
    plan: Plan,
    capacity: tuple[int, int] | None,
) -> tuple[Tensor, ...]:
    """As `reference.mask_tokens`."""
    with _cuda.current_stream(tokens.device) as where:
        return _mask_tokens("cuda", where, tokens, draw, lengths, plan, capacity)


@functools.lru_cache(maxsize=64)
def _native(plan: Plan) -> Any:
    return native_plan(_ext.require().MaskBlockPlan, plan)  # the plan is this cache's key, so it lives as long


def _mask_tokens(
    target: str,
    where: tuple[int, int],
    tokens: Tensor,
    draw: Draw,
    lengths: Tensor | None,
    plan: Plan,
    capacity: Sequence[int] | None,
) -> tuple[Tensor, ...]:
    """The op on "cuda" at (device, stream), or on "host", where tests run its block programs, at (seed, threads)."""
    extension = _ext.require()
    empty = functools.partial(torch.empty, device=tokens.device)
    batch, modalities = tokens.shape[0], plan.spec.num_modalities
    tokens, sample_ids, lengths = readable(tokens, draw, lengths)
    common = (
        *(_native(plan), draw.seed, draw.epoch, sample_ids.data_ptr(), batch),
        0 if lengths is None else lengths.data_ptr(),
    )

    segments = [(empty((batch, modalities), dtype=torch.int32), empty(batch + 1, dtype=torch.int32)) for _ in "io"]
    pointers = [(counts.data_ptr(), cu_seqlens.data_ptr()) for counts, cu_seqlens in segments]
    totals, fits = empty(3, dtype=torch.int32), empty(1, dtype=torch.bool)
    limits = capacity or (_UNLIMITED, _UNLIMITED)
    getattr(extension, f"mask_tokens_draw_{target}")(
        *common, *pointers[0], limits[0], *pointers[1], limits[1], totals.data_ptr(), fits.data_ptr(), *where
    )
    sizes: Sequence[int]
    if capacity is None:
        *sizes, bad = totals.tolist()  # waits for the device
        if bad:
            assert lengths is not None
            check_lengths(lengths.cpu(), plan.spec.max_seq_lens)  # raises
    else:
        sizes = capacity
        torch._assert_async(fits, _UNFIT)

    packed = [tuple(empty(size, dtype=torch.int64) for _ in range(3)) for size in sizes]
    sides = [
        (*pointers[i], *(x.data_ptr() for x in packed[i]), sizes[i], fill) for i, fill in enumerate((0, IGNORE_INDEX))
    ]
    getattr(extension, f"mask_tokens_fill_{target}")(
        *(*common, fits.data_ptr(), tokens.data_ptr(), TOKEN_TYPES[tokens.dtype], tokens.stride(0)),
        *(*sides[0], *sides[1], *where),
    )
    (in_counts, in_cu), (out_counts, out_cu) = segments
    return (*packed[0], in_cu, in_counts, *packed[1], out_cu, out_counts)
