"""The launches of layer_norm for the compile gates of `m4kernels.aot`."""

from typing import Any

from m4kernels.aot import AotCase
from m4kernels.ops.layer_norm import triton_kernels as kernels
from m4kernels.ops.layer_norm.triton import ROWS, SUM, SUM_WARPS, launch_of

# At 128 registers a multiprocessor holds 16 warps, each of which loads 6 KB of a row of 640 columns at once: three
# times what hides the memory's latency.
FORWARD = {"max_registers": 80, "wide_bytes": 16}
BACKWARD = {"max_registers": 128, "wide_bytes": 16}
# Accesses below 16 bytes: mean and 1 / deviation of a row, and the last 128 of 640 columns in 16 bits, which are 8
# bytes a thread of the warp, read and written.
OF_ROWS, OF_16_BITS = 2, 2
# (dtype of what a layer adds and reads, columns, whether something is added, dtype of the normed rows): M4's norms in
# bfloat16, the last of its decoder, float16, those in float32; and several warps a row.
LAUNCHES = (
    ("bf16", 640, True, "bf16"),
    ("bf16", 640, False, "bf16"),
    ("bf16", 640, True, "fp32"),
    ("fp16", 640, True, "fp16"),
    ("fp32", 640, True, "fp32"),
    ("fp32", 640, False, "fp32"),
    ("bf16", 1024, True, "bf16"),
    ("bf16", 4096, True, "bf16"),
)


def aot_cases() -> list[AotCase]:
    """Every launch, at widths that are multiples of 16."""
    cases = []

    def add(name: str, kernel: Any, launch: dict[str, Any], types: dict[str, str | None], **gates: Any) -> None:
        constexprs = dict(launch)
        warps = constexprs.pop("num_warps")
        signature = {argument: type_ for argument, type_ in types.items() if type_ is not None}
        constexprs |= {argument: None for argument, type_ in types.items() if type_ is None}
        cases.append(AotCase(name, kernel, signature, constexprs, warps, **gates))

    wide = "*fp32:16"
    kept: dict[str, str | None] = {"weight": wide, "mean": wide, "rstd": wide, "tokens": "i32"}
    for dtype, dim, added, out in LAUNCHES:
        name = f"{dtype} {dim}{' added' if added else ''}{'' if out == dtype else f' to {out}'}"
        update, total, normed = f"*{dtype}:16" if added else None, wide if added else None, f"*{out}:16"
        forward = {"x": wide, "update": update, "total": total, "normed": normed, "eps": "fp32"}
        launch, narrow = launch_of(dim), {"narrow_accesses": OF_ROWS + (OF_16_BITS if dtype != "fp32" else 0)}
        add(
            f"forward {name}", kernels.norm_forward_kernel, launch | {"ROWS": ROWS}, kept | forward, **FORWARD, **narrow
        )
        # The last norm's sum has no further reader; an update in float32 has the gradient of x.
        grad_total = wide if added and out == dtype else None
        given = {"grad": normed, "grad_total": grad_total, "total": wide, "partial": wide, "rows": "i32"}
        written = {"dx": wide, "dupdate": update if dtype != "fp32" else None}
        add(f"backward {name}", kernels.norm_backward_kernel, launch, kept | given | written, **BACKWARD, **narrow)
    shares: dict[str, str | None] = {"partial": wide, "dweight": wide, "programs": "i32"}
    launch = {"DIM": 640, **SUM, "num_warps": SUM_WARPS}
    add("sum 640", kernels.norm_sum_kernel, launch, shares, max_registers=64, wide_bytes=16, narrow_accesses=1)
    return cases
