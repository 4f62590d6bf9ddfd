"""The launches of mask_tokens for the compile gates of `m4kernels.aot`."""

from collections.abc import Sequence

from m4kernels.aot import AotCase
from m4kernels.ops.mask_tokens.triton import draw_warps, fill_warps, tiles_of, without
from m4kernels.ops.mask_tokens.triton_kernels import draw_kernel, fill_kernel


def aot_cases() -> Sequence[AotCase]:
    """The launches of M4, of many modalities, and of the longest modality."""
    cases = []
    for what, lens, kind, with_lengths in (
        ("M4", (256, 39, 256, 39), "u16", False),
        ("M4 ragged", (256, 39, 256, 39), "i64", True),
        ("256 modalities", (3,) * 256, "i32", True),
        ("4096 long", (4096,), "u16", False),
    ):
        tiles = tiles_of(lens, interpreted=False)
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
                    without(common | {"gamma": "*i32:16", "exp2": "*i32:16"}, *ones),
                    ones | without(tiles, "BLOCK_N", "BLOCK_S", "CHUNK"),
                    num_warps=draw_warps(tiles),
                    max_registers=128,
                )
            )
        cases.append(
            AotCase(
                f"fill {what} {kind}",
                fill_kernel,
                without(common | packed, *ones),
                ones | tiles | {"tokens_l": 1},
                num_warps=fill_warps(tiles),
                max_registers=128,
            )
        )
    return cases
