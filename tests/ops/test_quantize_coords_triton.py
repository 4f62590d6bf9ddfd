"""quantize_coords in Triton: what the compiler makes of the arithmetic that bit-identity rests on; no GPU needed."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own, because this one may have TRITON_INTERPRET=1 set, under which nothing can be compiled.
COMPILE = """
import json
import subprocess
import tempfile

import triton

from m4kernels.aot import compile_case
from m4kernels.ops.quantize_coords.aot import aot_cases

compiled = []
compile_it = triton.compile
triton.compile = lambda *args, **keywords: compiled.append(compile_it(*args, **keywords)) or compiled[-1]
code = {}
for case in aot_cases():
    result = compile_case("quantize_coords", case, 90)
    assert not result.breaches, result
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled[-1].asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code[case.name] = (compiled[-1].asm["ptx"], sass)
print(json.dumps(code))
"""


def test_divisions_are_exact_and_nothing_is_fused() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    code = json.loads(done.stdout)
    assert len(code) == 6
    for name, (ptx, sass) in code.items():
        instructions = set(re.findall(r"\b(?:fma|div|rcp|mul|add|sub|neg)\.[a-z0-9.]*f(?:32|64)\b", ptx))
        kind = "f64" if "fp64" in name else "f32"
        # A canvas of 256 needs no division; the last bin, by which dequantising divides, is no power of two.
        divides = not name.endswith(("canvas 256", "shared scale"))
        assert {i for i in instructions if i.startswith(("fma", "div", "rcp"))} == (
            {f"div.rn.{kind}"} if divides else set()
        ), name
        assert not any("ftz" in i or "approx" in i for i in instructions), name
        assert {i for i in instructions if i.startswith("mul")} <= {"mul.f32", "mul.rn.f32", "mul.f64", "mul.rn.f64"}
        if not divides:  # the machine code of a division is made of fused operations; else there is none
            assert "FMUL" in sass, name
            assert "FFMA" not in sass, name
