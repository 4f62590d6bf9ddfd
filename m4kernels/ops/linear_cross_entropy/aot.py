"""The launches of linear_cross_entropy for the compile gates of `m4kernels.aot`."""

from itertools import product
from typing import Any

from m4kernels.aot import AotCase
from m4kernels.ops.linear_cross_entropy import triton_kernels as kernels
from m4kernels.ops.linear_cross_entropy.triton import (
    LAUNCHES,
    MAX_REGISTERS,
    SCALE,
    TOKENS,
    VECTOR,
    WHOLE_ROWS,
    launch_of,
    vector_launch,
)

# Kernels that read and write rows of logits 16 bytes at a time, and how many numbers of a token they read and write.
SCALARS = {kernels.whole_rows_kernel: 8, kernels.sweep_kernel: 15, kernels.gradient_kernel: 6}


def aot_cases() -> list[AotCase]:
    """Every launch, for the compile gates of `m4kernels.aot`; arguments are aligned as torch's and M4's are."""
    aligned = dict.fromkeys(("dim", "stride_x", "width", "classes", "pitch", "rows", "i_class", "first"), "i32:16")
    plain = dict.fromkeys(
        ("tokens", "count", "ignore_index", "stride_targets", "stride_limits", "stride_weights"), "i32"
    )
    integers = dict.fromkeys(("target", "limit", "best", "limits"), "*i32:16")
    floats = ("scale", "boost", "state", "nll", "term", "weights", "dx", "values", "factor")
    others = {"targets": "*i64:16", "correct": "*i1:16", "right": "*i1:16"} | dict.fromkeys(floats, "*fp32:16")
    cases = []

    def add(name: str, kernel: Any, launch: dict[str, int], types: dict[str, str], **constexprs: object) -> None:
        values = {"BLOCK": launch["BLOCK"]} | constexprs
        known = aligned | plain | integers | others | types
        signature = {argument: known[argument] for argument in kernel.arg_names if argument not in values}
        options = WHOLE_ROWS if kernel is kernels.whole_rows_kernel else {}
        warps = launch["num_warps"]
        gates: dict[str, Any] = {"max_registers": MAX_REGISTERS, "narrow_accesses": SCALARS.get(kernel, 0)}
        wide = 16 if kernel in SCALARS else 0
        cases.append(AotCase(name, kernel, signature, values, warps, options=options, wide_bytes=wide, **gates))

    for dtype, (block, _) in product(("fp32", "bf16", "fp16"), LAUNCHES):
        name, launch, types = f"{dtype} block {block}", launch_of(block), {"logits": f"*{dtype}:16"}
        add(f"whole rows {name}", kernels.whole_rows_kernel, launch, types, GRADIENT=True)
        add(f"sweep {name}", kernels.sweep_kernel, launch, types)
        add(f"gradient {name}", kernels.gradient_kernel, launch, types)
    odd, widest = {"logits": "*bf16:16", "width": "i32", "classes": "i32", "first": "i32"}, launch_of(LAUNCHES[-1][0])
    add("whole rows bf16, odd", kernels.whole_rows_kernel, widest, odd, GRADIENT=True)
    add("sweep bf16, odd", kernels.sweep_kernel, widest, odd)
    add("gradient bf16, odd", kernels.gradient_kernel, widest, odd)
    wide = vector_launch(VECTOR[0])
    for given, taken in (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")):
        types = {"x": f"*{given}:16", "out": f"*{taken}:16"}
        add(f"gather {given} to {taken}", kernels.gather_kernel, wide, types, stride_x_dim=1)
    for boost in (False, True):
        add(f"prepare boost {boost}", kernels.prepare_kernel, TOKENS, {}, BOOST=boost)
        plain_mean = {"BOOST": boost, "limits": None, "weights": None}
        add(f"prepare mean boost {boost}", kernels.prepare_kernel, TOKENS, {}, **plain_mean)
        add(f"finish rows boost {boost}", kernels.finish_rows_kernel, wide, {}, BOOST=boost)
    add("scale", kernels.scale_kernel, {"BLOCK": SCALE[0], "num_warps": SCALE[1]}, {})
    return cases
