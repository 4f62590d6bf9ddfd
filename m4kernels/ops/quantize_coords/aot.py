"""The launches of quantize_coords for the compile gates of `m4kernels.aot`."""

from collections.abc import Sequence

from m4kernels.aot import AotCase
from m4kernels.ops.quantize_coords.triton import BLOCK, dequantize_kernel, exact_inverse, grid_of_bins, quantize_kernel


def aot_cases() -> Sequence[AotCase]:
    """The launches at M4's grid (13 joints; the canvas of 256, and one that needs the division)."""
    cases = []
    for xy_type, joints, canvas in (("fp32", 13, 256.0), ("fp32", 13, 100.0), ("fp64", 17, 100.0), ("bf16", 13, 256.0)):
        shared = xy_type == "bf16"  # scale and offset shared by all samples; else one pair a sample
        strides = {name: 0 if shared and name.endswith("_n") else None for name in ("scale_n", "offset_n")}
        ones = {"scale_c": 1, "offset_c": 1} | {name: n for name, n in strides.items() if n is not None}
        cases.append(
            AotCase(
                f"quantize {xy_type} joints {joints} canvas {canvas:g}" + (" shared scale" if shared else ""),
                quantize_kernel,
                {"xy": f"*{xy_type}:16", "visible": "*i1:16", "scale": f"*{xy_type}:16", "offset": f"*{xy_type}:16"}
                | {"tokens": "*i64:16", "total": "i32"}
                | {name: "i32" for name in strides if name not in ones},
                ones | grid_of_bins(joints, canvas, 8192) | {"INVERSE": exact_inverse(canvas)},
                num_warps=BLOCK // 32,
                options={"enable_fp_fusion": False},
                max_registers=40,
            )
        )
    for kind in ("i64", "u16"):
        cases.append(
            AotCase(
                f"dequantize {kind}",
                dequantize_kernel,
                {"tokens": f"*{kind}:16", "xy": "*fp32:16", "visible": "*i1:16", "total": "i32"},
                grid_of_bins(13, 256.0, 8192),
                num_warps=BLOCK // 32,
                options={"enable_fp_fusion": False},
                max_registers=40,
            )
        )
    return cases
