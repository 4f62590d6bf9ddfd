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
from m4kernels.ops.mask_tokens.arguments import MaskArguments
from m4kernels.ops.mask_tokens.plan import Plan
from m4kernels.ops.mask_tokens.reference import LOW32, check_lengths, require, too_small
from m4kernels.ops.mask_tokens.triton_kernels import draw_kernel, fill_kernel

MAX_LENGTH = 4096  # positions that one program ranks: eight a lane at 16 warps
# The interpreter takes tens of milliseconds a program, whatever its size: there, as many samples at a time as may be.
INTERPRETED_SAMPLES = 64


def can_run(call: MaskArguments) -> str | None:
    """Modalities of up to MAX_LENGTH tokens."""
    longest = max(call.plan.spec.max_seq_lens)
    return None if longest <= MAX_LENGTH else f"it ranks modalities of up to {MAX_LENGTH} tokens, got {longest}"


@functools.lru_cache(maxsize=64)
def _layout(plan: Plan) -> Tensor:
    """int32 (4 M + 4,): of each modality the table row of its input alpha, that of its target alpha, its length and
    where it begins; then the lowest and highest number of inputs and of targets."""
    lens, inputs, targets = plan.spec.max_seq_lens, plan.inputs, plan.targets
    begins = [sum(lens[:m]) for m in range(len(lens))]
    values = [*inputs.rows, *targets.rows, *lens, *begins, inputs.low, inputs.high, targets.low, targets.high]
    return torch.tensor(values, dtype=torch.int32).to(plan.gamma.device)


def tiles_of(lens: Sequence[int], interpreted: bool) -> dict[str, int]:
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


def without(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def draw_warps(tiles: Mapping[str, int]) -> int:
    return max(1, tiles["BLOCK_M"] // 32)  # an element a lane: with two, Triton 3.6 spills


def fill_warps(tiles: Mapping[str, int]) -> int:
    return max(1, tiles["BLOCK_N"] // 256)  # at most eight positions a lane


def _signed(word: int) -> int:
    """32 bits as the int32 that keeps the compiled kernel's signature the same for all values."""
    word &= LOW32
    return word - 2**32 if word >= 2**31 else word


def mask_tokens(call: MaskArguments) -> tuple[Tensor, ...]:
    """As `reference.mask_tokens`."""
    tokens, draw, lengths, plan, capacity = call
    device, lens = tokens.device, plan.spec.max_seq_lens
    batch, modalities = tokens.shape[0], len(lens)
    on_cpu = device.type == "cpu"
    tiles = tiles_of(lens, interpreted=on_cpu)
    blocks = triton.cdiv(batch, tiles["BLOCK_B"])

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    counts = [empty(batch, modalities, dtype=torch.int32) for _ in "io"]
    starts = empty(batch, dtype=torch.int64)
    block_sums = empty(2, blocks, dtype=torch.int64)
    sums, faults = block_sums
    lengths_b, lengths_m = (0, 0) if lengths is None else lengths.stride()
    tokens_b, tokens_l = tokens.stride()
    ids = draw.sample_ids
    both = {
        "sample_ids": ids,
        "lengths": lengths,
        "layout": _layout(plan),
        "in_counts": counts[0],
        "out_counts": counts[1],
        "starts": starts,
        "sums": sums,
        "faults": faults,
        "ids_b": ids.stride(0),
        "lengths_b": lengths_b,
        "lengths_m": lengths_m,
        "batch": batch,
        "seed_low": _signed(draw.seed),
        "seed_high": _signed(draw.seed >> 32),
        "epoch": _signed(draw.epoch),
    }
    with launch_on(tokens):
        if blocks:
            draw_kernel[(blocks,)](
                **both,
                gamma=plan.gamma,
                exp2=plan.exp2,
                **without(tiles, "BLOCK_N", "BLOCK_S", "CHUNK"),
                num_warps=draw_warps(tiles),
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
        inputs, targets = ([empty(size, dtype=torch.int64) for _ in range(3)] for size in sizes)
        in_cu, out_cu = (empty(batch + 1, dtype=torch.int32) for _ in "io")
        ok = empty(1, dtype=torch.bool)
        fill_kernel[(max(1, triton.cdiv(batch, tiles["BLOCK_S"])), modalities)](
            **both,
            **dict(zip(("in_ids", "in_positions", "in_modalities"), inputs, strict=True)),
            **dict(zip(("out_ids", "out_positions", "out_modalities"), targets, strict=True)),
            tokens=tokens,
            tokens_b=tokens_b,
            tokens_l=tokens_l,
            in_cu=in_cu,
            out_cu=out_cu,
            ok=ok,
            blocks=blocks,
            in_capacity=sizes[0],
            out_capacity=sizes[1],
            **tiles,
            num_warps=fill_warps(tiles),
        )
        if capacity is not None and not on_cpu:
            require(ok, lambda: "")  # on a GPU the message is the device's
    return (*inputs, in_cu, counts[0], *targets, out_cu, counts[1])
