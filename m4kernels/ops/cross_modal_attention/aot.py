"""The launches of cross_modal_attention for the compile gates of `m4kernels.aot`."""

from dataclasses import replace
from typing import Any

from m4kernels.aot import AotCase
from m4kernels.ops.cross_modal_attention import triton_kernels as kernels
from m4kernels.ops.cross_modal_attention.triton import LAUNCHES, Launch, Launches, launch_options

# The compiler puts up to 4 registers on the stack where that makes room for one more block on a multiprocessor; not so
# for M4's launches on an H100.
FEW_SPILLS = 16


def aot_cases() -> list[AotCase]:
    """Every launch of the table, with 4 modalities, and without `allow` at M4's head_dim; and odd ones."""
    cases = []
    for (size, head_dim), launches in LAUNCHES.items():
        dtype = "bf16" if size == 2 else "fp32"
        for kernel, launch in zip(Launches._fields, launches, strict=True):
            for masked in (True, False) if head_dim == 64 else (True,):
                case = _aot_case(kernel, launch, dtype, head_dim, masked=masked)
                few = replace(case, max_stack_bytes=FEW_SPILLS)
                if dtype == "fp32":  # 2 blocks of 8 warps a multiprocessor, or 3 of 4
                    cases.append(replace(few, max_registers=128 if launch.num_warps == 8 else 168))
                elif head_dim == 64:  # 3 blocks of 4 warps
                    cases.append(replace(case, max_registers=168, architectures=(90,)))
                    cases.append(replace(few, max_registers=168, architectures=(100,)))
                    cases.append(replace(few, architectures=(80,)))
                else:
                    cases.append(few)
    for kernel, launch in zip(Launches._fields, LAUNCHES[2, 128], strict=True):
        odd = _aot_case(kernel, launch, "fp16", 72, group=2)
        # Rows that begin anywhere are loaded number by number: each has an address, more than there are registers for.
        spills = 72 if kernel == "grad_kv" else FEW_SPILLS
        cases.append(replace(odd, max_stack_bytes=spills, architectures=(90,)))
    return cases


def _aot_case(name: str, launch: Launch, dtype: str, head_dim: int, *, masked: bool = True, group: int = 1) -> AotCase:
    """One launch, specialised as for views into a fused projection of M4: everything aligned, whatever the total."""
    kernel = getattr(kernels, f"{name}_kernel")
    options = launch_options(launch, group, 4, head_dim, masked=masked)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    compiler = {"maxnreg": options.pop("maxnreg")} if "maxnreg" in options else {}
    constants: dict[str, Any] = options if masked else options | {"allow": None}
    types = {name: _aot_type(name, dtype, head_dim) for name in kernel.arg_names if name not in constants}
    title = f"{name} {dtype} head_dim {head_dim}{'' if masked else ', no allow'}"
    if group != 1:
        title += f", {group} heads a group"
    # Rows begin at multiples of 16 bytes where 16 divides head_dim; of lse_delta at multiples of 8.
    copies = 0 if head_dim % 16 else 8 if name == "grad_kv" else 16
    return AotCase(title, kernel, types, constants, warps, stages, compiler, async_bytes=copies)


def _aot_type(argument: str, dtype: str, head_dim: int) -> str:
    if argument.startswith("stride"):
        return "i32" if head_dim % 16 else "i32:16"
    if argument.endswith(("cu_seqlens", "counts")):
        return "*i32:16"
    integers = ("total", "q_total", "samples", "heads", "tiles", "pitch")
    types = {"allow": "*i1:16", "scale": "fp32", "lse": "*fp32:16", "lse_delta": "*i64:16"}
    return (types | dict.fromkeys(integers, "i32")).get(argument, f"*{dtype}:16")
