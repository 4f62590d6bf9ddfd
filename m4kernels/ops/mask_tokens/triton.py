"""mask_tokens in Triton: how `triton_kernels` is launched.

With a capacity nothing waits for the device: two launches, and a third for the assertion that lengths and capacity
fit. All of it is latency at a batch of 96 of M4, so both kernels are spread thinly, one warp a program, where sums need
no barrier: the first takes 8 samples a program (a lane a sample and modality, 12 programs), the second one modality of
one sample, up to 256 positions a warp, 384 programs that all run at once on an H200's 528 schedulers. Not yet timed.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from m4kernels._triton import launch_on
from m4kernels.aot import AotCase
from m4kernels.ops.mask_tokens.plan import Plan
from m4kernels.ops.mask_tokens.reference import LOW32, Draw, check_lengths, require, too_small
from m4kernels.ops.mask_tokens.triton_kernels import draw_kernel, fill_kernel

MAX_LENGTH = 4096  # positions that one program ranks: eight a lane at 16 warps
# The interpreter takes tens of milliseconds a program, whatever its size: there, as many samples at a time as may be.
INTERPRETED_SAMPLES = 64


def can_run(tokens: Tensor, draw: Draw, lengths: Tensor | None, plan: Plan, capacity: object) -> str | None:
    """Modalities of up to MAX_LENGTH tokens."""
    longest = max(plan.spec.max_seq_lens)
    return None if longest <= MAX_LENGTH else f"it ranks modalities of up to {MAX_LENGTH} tokens, got {longest}"


@functools.lru_cache(maxsize=64)
def _layout(plan: Plan) -> Tensor:
    """int32 (4 M + 4,): of each modality the table row of its input alpha, that of its target alpha, its length and
    where it begins; then the lowest and highest number of inputs and of targets."""
    lens, inputs, targets = plan.spec.max_seq_lens, plan.inputs, plan.targets
    begins = [sum(lens[:m]) for m in range(len(lens))]
    values = [*inputs.rows, *targets.rows, *lens, *begins, inputs.low, inputs.high, targets.low, targets.high]
    return torch.tensor(values, dtype=torch.int32).to(plan.gamma.device)


def _tiles(lens: Sequence[int], interpreted: bool) -> dict[str, int]:
    """Constants of the kernels; reductions want sizes of at least 2, and positions come in fours."""
    block_m = max(2, triton.next_power_of_2(len(lens)))
    return {
        "MODALITIES": len(lens),
        "BLOCK_M": block_m,
        "BLOCK_N": max(16, triton.next_power_of_2(max(lens))),
        "BLOCK_B": INTERPRETED_SAMPLES if interpreted else max(1, 32 // block_m),  # a lane an element
        "BLOCK_S": INTERPRETED_SAMPLES if interpreted else 1,
        "CHUNK": 128,  # 1,024 samples of M4 in one load
    }


def _without(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def _draw_warps(tiles: Mapping[str, int]) -> int:
    return max(1, tiles["BLOCK_M"] // 32)  # an element a lane: with two, Triton 3.6 spills


def _fill_warps(tiles: Mapping[str, int]) -> int:
    return max(1, tiles["BLOCK_N"] // 256)  # at most eight positions a lane


def _signed(word: int) -> int:
    """32 bits as the int32 that keeps the compiled kernel's signature the same for all values."""
    word &= LOW32
    return word - 2**32 if word >= 2**31 else word


def mask_tokens(
    tokens: Tensor,
    draw: Draw,
    lengths: Tensor | None,
    plan: Plan,
    capacity: tuple[int, int] | None,
) -> tuple[Tensor, ...]:
    """As `reference.mask_tokens`."""
    device, lens = tokens.device, plan.spec.max_seq_lens
    batch, modalities = tokens.shape[0], len(lens)
    on_cpu = device.type == "cpu"
    tiles = _tiles(lens, interpreted=on_cpu)
    blocks = triton.cdiv(batch, tiles["BLOCK_B"])

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    counts = [empty(batch, modalities, dtype=torch.int32) for _ in "io"]
    starts = empty(batch, dtype=torch.int64)
    block_sums = empty(2, blocks, dtype=torch.int64)
    sums, faults = block_sums
    lengths_strides = (0, 0) if lengths is None else lengths.stride()
    layout, ids = _layout(plan), draw.sample_ids
    seeds = (_signed(draw.seed), _signed(draw.seed >> 32), _signed(draw.epoch))
    with launch_on(tokens):
        if blocks:
            draw_kernel[(blocks,)](
                *(ids, lengths, layout, plan.gamma, plan.exp2, *counts, starts, sums, faults),
                *(ids.stride(0), *lengths_strides, batch, *seeds),
                **_without(tiles, "BLOCK_N", "BLOCK_S", "CHUNK"),
                num_warps=_draw_warps(tiles),
            )
        if capacity is not None and not on_cpu:
            sizes = capacity
        else:
            total, wrong = block_sums.sum(1).tolist()  # waits for the device
            if lengths is not None and wrong:
                check_lengths(lengths.cpu(), lens)
            totals = (total & LOW32, total >> 32)
            sizes = capacity or totals
            for name, needed, given in zip(("input", "target"), totals, sizes, strict=True):
                if needed > given:
                    raise ValueError(too_small(name, needed, given))
        packed = [[empty(size, dtype=torch.int64) for _ in range(3)] for size in sizes]
        cu_seqlens = [empty(batch + 1, dtype=torch.int32) for _ in "io"]
        ok = empty(1, dtype=torch.bool)
        fill_kernel[(max(1, triton.cdiv(batch, tiles["BLOCK_S"])), modalities)](
            *(tokens, ids, lengths, layout, *counts, starts, sums, faults),
            *(*packed[0], cu_seqlens[0], *packed[1], cu_seqlens[1], ok),
            *(*tokens.stride(), ids.stride(0), *lengths_strides, batch, blocks, *sizes, *seeds),
            **tiles,
            num_warps=_fill_warps(tiles),
        )
        if capacity is not None and not on_cpu:
            require(ok, lambda: "")  # on a GPU the message is the device's
    return (*packed[0], cu_seqlens[0], counts[0], *packed[1], cu_seqlens[1], counts[1])


def aot_cases() -> Sequence[AotCase]:
    """The launches of M4, of many modalities, and of the longest modality."""
    cases = []
    for what, lens, kind, with_lengths in (
        ("M4", (256, 39, 256, 39), "u16", False),
        ("M4 ragged", (256, 39, 256, 39), "i64", True),
        ("256 modalities", (3,) * 256, "i32", True),
        ("4096 long", (4096,), "u16", False),
    ):
        tiles = _tiles(lens, interpreted=False)
        absent = {} if with_lengths else {"lengths": None, "lengths_b": 0, "lengths_m": 0}
        common = {"sample_ids": "*i64:16", "lengths": "*i64:16", "layout": "*i32:16"}
        common |= dict.fromkeys(("in_counts", "out_counts"), "*i32:16")
        common |= {"starts": "*i64:16", "sums": "*i64:16", "faults": "*i64"}
        common |= dict.fromkeys(("lengths_b", "batch", "seed_low", "seed_high", "epoch"), "i32")
        ones = {"ids_b": 1, "lengths_m": 1} | absent
        packed = {f"{side}_{name}": "*i64:16" for side in ("in", "out") for name in ("ids", "positions", "modalities")}
        packed |= {"in_cu": "*i32:16", "out_cu": "*i32:16", "ok": "*i1:16", "tokens": f"*{kind}:16", "tokens_b": "i32"}
        packed |= dict.fromkeys(("blocks", "in_capacity", "out_capacity"), "i32")
        if len(lens) > 1:  # the draw does not depend on the lengths, and is the slower to compile
            cases.append(
                AotCase(
                    f"draw {what}",
                    draw_kernel,
                    _without(common | {"gamma": "*i32:16", "exp2": "*i32:16"}, *ones),
                    ones | _without(tiles, "BLOCK_N", "BLOCK_S", "CHUNK"),
                    num_warps=_draw_warps(tiles),
                    max_registers=128,
                )
            )
        cases.append(
            AotCase(
                f"fill {what} {kind}",
                fill_kernel,
                _without(common | packed, *ones),
                ones | tiles | {"tokens_l": 1},
                num_warps=_fill_warps(tiles),
                max_registers=128,
            )
        )
    return cases
