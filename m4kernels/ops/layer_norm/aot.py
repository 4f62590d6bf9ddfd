"""The launches of layer_norm for the compile gates of `m4kernels.aot`."""

from itertools import product
from typing import Any

from m4kernels.aot import AotCase
from m4kernels.ops.layer_norm import triton_kernels as kernels
from m4kernels.ops.layer_norm.triton import ROWS, SUM, SUM_WARPS, launch_of

# By columns: most registers of a thread, forward and backward. At 128 a multiprocessor holds 16 warps, each of which
# loads 6 KB of a row of 640 columns at once: three times what hides the memory's latency.
MAX_REGISTERS = {640: (80, 128), 1024: (104, 184), 4096: (128, 248)}
# Accesses below 16 bytes of 640 columns: mean and 1 / deviation of a row, and the last 128 columns in 16 bits, which are
# 8 bytes a thread of the warp: of update and normed rows; of their gradients.
NARROW = 4


def aot_cases() -> list[AotCase]:
    """Every launch at widths that are multiples of 16, M4's first."""
    cases = []

    def add(name: str, kernel: Any, launch: dict[str, Any], types: dict[str, str | None], **gates: Any) -> None:
        launch = dict(launch)
        warps = launch.pop("num_warps")
        signature = {argument: type_ for argument, type_ in types.items() if type_ is not None}
        absent = {argument: None for argument, type_ in types.items() if type_ is None}
        cases.append(AotCase(name, kernel, signature, launch | absent, warps, **gates))

    kept = {"weight": "*fp32:16", "mean": "*fp32:16", "rstd": "*fp32:16"}
    for (dim, registers), added, dtype in product(MAX_REGISTERS.items(), (True, False), ("bf16", "fp16", "fp32")):
        name = f"{dtype} {dim}{' added' if added else ''}"
        narrow, wide = f"*{dtype}:16", "*fp32:16"
        stream: dict[str, str | None] = {
            "x": wide,
            "update": narrow if added else None,
            "total": wide if added else None,
        }
        add(
            f"forward {name}",
            kernels.forward_kernel,
            launch_of(dim) | {"ROWS": ROWS},
            kept | stream | {"normed": narrow, "tokens": "i32", "eps": "fp32"},
            max_registers=registers[0],
            wide_bytes=16,
            narrow_accesses=NARROW,
        )
        given = {"grad": narrow, "grad_total": wide if added else None, "total": wide, "partial": wide}
        written = {"dx": wide, "dupdate": narrow if added and dtype != "fp32" else None}
        add(
            f"backward {name}",
            kernels.backward_kernel,
            launch_of(dim),
            kept | given | written | {"tokens": "i32", "rows": "i32"},
            max_registers=registers[1],
            wide_bytes=16,
            narrow_accesses=NARROW,
        )
    for dim in MAX_REGISTERS:
        shares: dict[str, str | None] = {"partial": "*fp32:16", "dweight": "*fp32:16", "programs": "i32"}
        launch = {"DIM": dim, **SUM, "num_warps": SUM_WARPS}
        add(f"sum {dim}", kernels.sum_kernel, launch, shares, max_registers=64, wide_bytes=16, narrow_accesses=1)
    return cases
