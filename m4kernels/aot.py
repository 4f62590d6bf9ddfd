"""`python -m m4kernels.aot`: compile the Triton kernels ahead of time, without a GPU, and gate what the compiler says.

Every op with a Triton backend has a module `m4kernels.ops.<op>.aot` with a function `aot_cases() -> Sequence[AotCase]`:
the launches it makes. Each is compiled for sm_80, sm_90 and sm_100; the table shows registers, stack and shared memory
of each, and the exit status is 1 where one spills, needs more shared memory than the architecture has, passes its
ceiling of registers, or accesses global memory, or copies it asynchronously, in narrower pieces than it claims.
"""

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import m4kernels.ops

ARCHITECTURES = (80, 90, 100)
# Shared memory that one block may have: the multiprocessor's 164 KB (A100) or 228 KB (H100, B200) less 1 KB of its own.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class AotCase:
    """One launch configuration of a kernel, as at run time, and the gates that its compiled form must pass.

    Args:
        name: says which launch, such as "forward bfloat16 head_dim 64".
        kernel: the `triton.jit` function.
        signature: type of every argument that is not in `constexprs`, as Triton writes it: "*bf16", "i32", "i64",
            "fp32", "*i1"; with ":16" appended ("*bf16:16", "i32:16") where the launcher guarantees that the address or
            value is a multiple of 16, which Triton finds out by itself at run time.
        constexprs: value of every `tl.constexpr`, of arguments passed as None, and of integers that are always 1,
            which Triton specialises on.
        num_warps: as at the launch.
        num_stages: as at the launch.
        options: further options of the launch, such as `{"enable_fp_fusion": False}`.
        max_registers: ceiling of registers a thread.
        max_shared_bytes: ceiling of shared memory a block, besides what the architecture has.
        max_stack_bytes: ceiling of the stack a thread, where spilled registers go.
        wide_bytes: how many bytes a thread reads or writes at once where the kernel claims it; 0 for no claim.
        narrow_accesses: accesses of global memory below `wide_bytes` that it may have all the same, for its scalars.
        async_bytes: how many bytes at least each asynchronous copy to shared memory moves where the kernel claims that
            its loop loads by such copies, so that there are some; 0 for no claim.
        architectures: compute capabilities to compile for, such as 90 for sm_90.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    max_registers: int = 255
    max_shared_bytes: int = max(SHARED_LIMIT.values())
    max_stack_bytes: int = 0
    wide_bytes: int = 0
    narrow_accesses: int = 0
    async_bytes: int = 0
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class AotResult:
    """What one case needs on one architecture, and which gates that breaches."""

    op: str
    case: AotCase
    architecture: int
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    breaches: tuple[str, ...] = ()

    def row(self) -> tuple[str, ...]:
        launch = f"{self.case.num_warps} x {self.case.num_stages}"
        figures = [str(n) for n in (self.registers, self.case.max_registers, self.stack_bytes, self.shared_bytes)]
        verdict = "; ".join(self.breaches) or "ok"
        return self.op, self.case.name, f"sm_{self.architecture}", launch, *figures, verdict


# Ceilings of registers that some versions of Triton need, where no launch is good with all of them. By (op, case,
# architecture): (the first such version, the ceiling, with its reason).
VERSION_CEILINGS: dict[tuple[str, str, int], tuple[tuple[int, int], int]] = {}

HEADER = ("op", "case", "arch", "warps x stages", "registers", "of", "stack B", "shared B", "verdict")


def discover(names: Iterable[str] = ()) -> dict[str, Sequence[AotCase]]:
    """The cases of every op, or of the named ones, that has a module `aot`.

    Raises:
        ValueError: a named op has none.
    """
    named, found = list(names), {}
    for op in sorted(module.name for module in pkgutil.iter_modules(m4kernels.ops.__path__)):
        path = f"m4kernels.ops.{op}.aot"
        if (not named or op in named) and importlib.util.find_spec(path) is not None:
            found[op] = importlib.import_module(path).aot_cases()
    missing = [op for op in named if op not in found]
    if missing:
        raise ValueError(
            f"no aot.py in the folder of {', '.join(missing)}; found those of {', '.join(found) or 'none'}"
        )
    return found


def compile_case(op: str, case: AotCase, architecture: int) -> AotResult:
    """Compile one case for one architecture; a compiler error is a breach too."""
    case = _for_this_version(op, case, architecture)
    try:
        registers, stack, shared, ptx = _compile(case, architecture)
    except Exception as error:  # any error of the compiler is this row's verdict; the other rows still count
        return AotResult(op, case, architecture, breaches=(f"does not compile: {type(error).__name__}: {error}",))
    limits = (
        ("registers", registers, case.max_registers),
        ("bytes of stack (spills)", stack, case.max_stack_bytes),
        ("bytes of shared memory", shared, min(case.max_shared_bytes, SHARED_LIMIT[architecture])),
    )
    breaches = tuple(f"{value} {what}, at most {limit} allowed" for what, value, limit in limits if value > limit)
    widths, copies = _access_widths(ptx), _copy_widths(ptx)
    narrow = [width for width in widths if width < case.wide_bytes]
    if len(narrow) > case.narrow_accesses or (case.wide_bytes and len(narrow) == len(widths)):
        breaches += (
            f"{len(narrow)} of {len(widths)} accesses of global memory are below {case.wide_bytes} bytes, at most "
            f"{case.narrow_accesses} allowed",
        )
    if case.async_bytes and not copies:
        breaches += ("no asynchronous copies: the compiler did not overlap the loop's loads with its work",)
    if narrow := [width for width in copies if width < case.async_bytes]:
        breaches += (f"{len(narrow)} of {len(copies)} asynchronous copies are below {case.async_bytes} bytes",)
    return AotResult(op, case, architecture, registers, stack, shared, breaches)


def _for_this_version(op: str, case: AotCase, architecture: int) -> AotCase:
    """The case with the ceiling that the Triton at hand needs."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    since, ceiling = VERSION_CEILINGS.get((op, case.name, architecture), (None, 0))
    return replace(case, max_registers=ceiling) if since is not None and version >= since else case


def _compile(case: AotCase, architecture: int) -> tuple[int, int, int, str]:
    """(registers a thread, bytes of stack a thread, bytes of shared memory a block, PTX)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    given = [*case.signature, *case.constexprs]
    if sorted(given) != sorted(names):
        raise ValueError(f"signature and constexprs name {sorted(given)}, the kernel takes {sorted(names)}")
    types = {name: case.signature.get(name, "constexpr").partition(":") for name in names}
    # The order matters: Triton takes the n-th entry of the signature for the n-th argument.
    signature = {name: type_ for name, (type_, _, _) in types.items()}
    attributes = {
        (i,): [["tt.divisibility", int(divisor)]] for i, (_, _, divisor) in enumerate(types.values()) if divisor
    }
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _resource_usage(compiled.asm["cubin"])
    return registers, stack, compiled.metadata.shared, compiled.asm["ptx"]


def _access_widths(ptx: str) -> list[int]:
    """Bytes of every load and store of global memory, such as 16 of `ld.global.v4.b32`."""
    found = re.findall(r"\b(?:ld|st)\.global(?:\.[\w:]+)*?(?:\.v([248]))?\.[bfsu](8|16|32|64|128)\b", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


def _copy_widths(ptx: str) -> list[int]:
    """Bytes of every asynchronous copy from global to shared memory."""
    copies = r"\bcp\.async\.c[ag]\.shared\.global(?:\.[\w:]+)*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)"
    return [int(width, 0) for width in re.findall(copies, ptx)]


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack and local bytes) of the kernel in a cubin, from the cuobjdump that Triton ships."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: max(map(int, re.findall(rf"\b{key}:(\d+)", text))) for key in ("REG", "STACK", "LOCAL")}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_all(
    ops: Mapping[str, Sequence[AotCase]], architectures: Iterable[int] = ARCHITECTURES, jobs: int | None = None
) -> list[AotResult]:
    """Results of every case of every op, in order; `jobs` compile at a time, by default one a CPU core."""
    work = [
        (op, case, architecture)
        for (op, cases), architecture in product(ops.items(), architectures)
        for case in cases
        if architecture in case.architectures
    ]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_case(*job), work))


def table(results: Sequence[AotResult]) -> str:
    """The results as aligned columns."""
    rows = [HEADER, *(result.row() for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def report(
    ops: Mapping[str, Sequence[AotCase]], architectures: Iterable[int] = ARCHITECTURES, jobs: int | None = None
) -> int:
    """Compile everything, print the table and return the exit status: 1 where a gate is breached."""
    results = compile_all(ops, architectures, jobs)
    print(table(results))
    breached = sum(bool(result.breaches) for result in results)
    print(f"{len(results)} compiled, {breached} in breach of a gate")
    return 1 if breached else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 all well, 1 a gate is breached, 2 it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m m4kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help="ops to compile; default all")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, help="compilations at a time; default one a CPU core")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: `pip install triton`", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 turns the kernels into Python functions: unset it to compile them", file=sys.stderr)
        return 2
    try:
        ops = discover(options.op)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return report(ops, options.arch, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
