"""Every Triton kernel compiles for the GPUs we name, without spills and within shared memory; no GPU needed.

In processes of their own, because this one may have TRITON_INTERPRET=1 set, under which nothing can be compiled.
"""

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import m4kernels.ops
from tests.ops.targets import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
OPS = [
    module.name
    for module in pkgutil.iter_modules(m4kernels.ops.__path__)
    if importlib.util.find_spec(f"m4kernels.ops.{module.name}.triton") is not None
]

# Subtracts a row's mean, so that it must hold the whole row; the sum over several warps takes shared memory.
EXAMPLE = """
import sys
from dataclasses import replace

import triton
import triton.language as tl

from m4kernels.aot import AotCase, report


@triton.jit
def centre(x, out, stride, BLOCK: tl.constexpr):
    o_row = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    b_x = tl.load(x + o_row)
    tl.store(out + o_row, b_x - tl.sum(b_x, 0) / BLOCK)


@triton.jit
def total(x, out, steps, stride, BLOCK: tl.constexpr):
    # Of products of blocks, whose loads the compiler pipelines unless a branch surrounds them.
    o_row, o_column = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    b_sum = tl.zeros((32, 32), tl.float32)
    for i in range(steps):
        wanted = True
        if BLOCK:
            wanted = tl.load(out + i) > 0.0
        if wanted:
            b_x = tl.load(x + i * 32 * stride + o_row * stride + o_column)
            b_sum += tl.dot(b_x, b_x)
    tl.store(out + o_row * 32 + o_column, b_sum)


loop = AotCase(
    "loop",
    total,
    {"x": "*fp16:16", "out": "*fp32:16", "steps": "i32", "stride": "i32:16"},
    {"BLOCK": 0},
    async_bytes=16,
)
case = AotCase("within", centre, {"x": "*fp32:16", "out": "*fp32:16", "stride": "i32:16"}, {"BLOCK": 256})
cases = {
    "within": case,
    "async": loop,
    "branch": replace(loop, constexprs={"BLOCK": 1}),
    "short": replace(loop, async_bytes=32),
    "registers": replace(case, max_registers=5),
    "shared": replace(case, max_shared_bytes=0),
    "spills": replace(case, constexprs={"BLOCK": 16384}, num_warps=1),
    "signature": replace(case, signature={"x": "*fp32"}),
    "wide": replace(case, constexprs={"BLOCK": 512}, wide_bytes=16),
    "narrow": replace(
        case, constexprs={"BLOCK": 512}, wide_bytes=16, signature={"x": "*fp32", "out": "*fp32:16", "stride": "i32:16"}
    ),
}
sys.exit(report({name: [cases[name]] for name in sys.argv[1:]}))
"""


def run(*command: str, interpret: bool = False) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


@pytest.mark.timeout(900)  # some 75 compilations, two at a time
@pytest.mark.parametrize("op", OPS)
def test_every_launch_compiles_within_its_gates(op: str) -> None:
    done = run("-m", "m4kernels.aot", op)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"
    assert all(f"sm_{architecture}" in done.stdout for architecture in (80, 90, 100)), done.stdout


def test_a_breached_gate_fails(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(EXAMPLE)
    done = run(str(file), "within", "wide", "async")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 compiled, 0 in breach" in done.stdout
    done = run(str(file), "within", "registers", "shared", "spills", "signature", "narrow", "branch", "short")
    assert done.returncode == 1
    for name, verdict in (
        ("within", r"ok"),
        ("registers", r"\d+ registers, at most 5 allowed"),
        ("shared", r"\d+ bytes of shared memory, at most 0 allowed"),
        ("spills", r"\d+ bytes of stack \(spills\), at most 0 allowed"),
        ("narrow", r"4 of 5 accesses of global memory are below 16 bytes, at most 0 allowed"),
        ("branch", r"no asynchronous copies"),
        ("short", r"(\d+) of \1 asynchronous copies are below 32 bytes"),
        ("signature", "does not compile: ValueError: signature and constexprs name"),
    ):
        assert len(re.findall(rf"^{name} .*{verdict}", done.stdout, re.M)) == 3, done.stdout


def test_ceilings_of_versions_name_launches() -> None:
    """No ceiling outlives the launch that it was made for."""
    program = """
from m4kernels.aot import VERSION_CEILINGS, discover
known = {(op, case.name, arch) for op, cases in discover().items() for case in cases for arch in case.architectures}
print(sorted(set(VERSION_CEILINGS) - known))
"""
    done = run("-c", program)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_refusals_say_why() -> None:
    done = run("-m", "m4kernels.aot", interpret=True)
    assert done.returncode == 2
    assert "unset it" in done.stderr
    done = run("-m", "m4kernels.aot", "no_such_op")
    assert done.returncode == 2
    assert "no aot.py in the folder of no_such_op" in done.stderr
