"""Gates on the CUDA kernels that need no GPU: registers, shared memory, spills, warnings, contraction."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from m4kernels import _ext

REPOSITORY = Path(__file__).resolve().parents[2]
# The most registers a thread may use. 1,024 threads have 64 each; of blocks of 256 threads, six share a multiprocessor
# up to 40 registers, five up to 48, four up to 64.
REGISTERS = {
    "mask_tokens draw_kernel": 64,
    "mask_tokens fill_kernel": 64,
    "quantize_coords quantize_kernel<float>": 48,
    "quantize_coords quantize_kernel<double>": 64,
    "quantize_coords dequantize_kernel": 40,
}
STATIC_SHARED = 48 * 1024  # bytes; more would need opting in
KERNEL_NAME = re.compile(r"_\d+_([a-z_]+?)_cuda_cu_[0-9a-f]{8}\d+([a-z_]+_kernel)(I[fd]E)?")


class Usage(NamedTuple):
    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int  # bytes of local memory, into which registers would be spilled


def find_cuobjdump() -> str:
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:  # which ships one
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return found or pytest.skip("cuobjdump is not installed (it comes with the CUDA toolkit and with Triton)")


def resource_usage(dump: str) -> list[Usage]:
    """What `cuobjdump --dump-resource-usage` says of every kernel and architecture."""
    out, arch, kernel = [], 0, ""
    for line in dump.splitlines():
        if line.startswith("arch = sm_"):
            arch = int(re.sub(r"\D", "", line))
        elif found := re.search(r"Function (\S+):", line):
            named = KERNEL_NAME.search(found[1])
            assert named is not None, f"a kernel with a name of another form: {found[1]}"
            kind = {None: "", "IfE": "<float>", "IdE": "<double>"}[named[3]]
            kernel = f"{named[1]} {named[2]}{kind}"
        elif "REG:" in line:
            value = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", line)}
            out.append(Usage(kernel, arch, value["REG"], value["SHARED"], value["STACK"] + value["LOCAL"]))
    return out


def test_resources() -> None:
    extension = _ext.require()
    if not extension.has_cuda:
        pytest.skip("the extension was built without CUDA")
    command = [find_cuobjdump(), "--dump-resource-usage", extension.__file__]
    usages = resource_usage(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"\n{'op and kernel':<42}{'arch':>8}{'registers':>11}{'shared':>9}{'spills':>8}")
    for u in sorted(usages):
        print(f"{u.kernel:<42}{f'sm_{u.arch}':>8}{u.registers:>11}{u.shared:>9}{u.stack:>8}")
    archs = [int(arch) for arch in extension.cuda_archs.split(";")]
    assert {(u.kernel, u.arch) for u in usages} == {(kernel, arch) for kernel in REGISTERS for arch in archs}
    assert not [u for u in usages if u.stack], "registers are spilled"
    assert not [u for u in usages if u.registers > REGISTERS[u.kernel]], "too many registers"
    assert not [u for u in usages if u.shared > STATIC_SHARED], "too much shared memory"


def test_the_gates_see_spills() -> None:
    """The form of cuobjdump's report is not documented: a reader that misses the figures would let everything pass."""
    dump = """
arch = sm_90
 Function _ZN3m4k56_GLOBAL__N__bb0a1790_23_quantize_coords_cuda_cu_e17aba1415quantize_kernelIdEEvNS_6TilingE:
  REG:60 STACK:16 SHARED:13312 LOCAL:8 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    expected = [Usage("quantize_coords quantize_kernel<double>", 90, 60, 13312, 24)]
    assert resource_usage(dump) == expected
    assert resource_usage(dump.replace("bb0a1790", "12345678")) == expected  # the hash of a file may have no letter


@pytest.mark.parametrize("source", sorted(p.name for p in REPOSITORY.glob("csrc/**/*_cuda.cu")))
def test_compiles_without_warnings_and_without_contraction(source: str, tmp_path: Path, build: ModuleType) -> None:
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    (path,) = REPOSITORY.glob(f"csrc/**/{source}")
    ptx = tmp_path / "kernel.ptx"
    command = [
        nvcc,
        *build.NVCC_FLAGS,
        f"-I{REPOSITORY / 'csrc'}",
        "-Werror",
        "all-warnings",
        "-arch=compute_90",
        "-ptx",
        str(path),
        "-o",
        str(ptx),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    code = ptx.read_text()
    assert not re.search(r"\bfma\.", code), "a contracted multiplication rounds once where the reference rounds twice"
    assert not re.search(r"\b(div|rcp|sqrt)\.(approx|full)", code), "division must be IEEE's"


def test_tokens_are_written_sixteen_bytes_at_a_time(tmp_path: Path, build: ModuleType) -> None:
    """nvcc splits a plain assignment of two 8-byte words."""
    nvcc, cuobjdump = build.find_nvcc(), find_cuobjdump()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    source, cubin = REPOSITORY / "csrc/quantize_coords/quantize_coords_cuda.cu", tmp_path / "quantize.cubin"
    flags = [*build.NVCC_FLAGS, "-arch=sm_90", "-cubin", f"-I{REPOSITORY / 'csrc'}"]
    subprocess.run([nvcc, *flags, source, "-o", cubin], check=True, timeout=240)
    code = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", code, re.DOTALL))
    quantize = [text for name, text in kernels.items() if "dequantize" not in name]
    assert len(quantize) == 2  # float32 and float64 coordinates
    for text in quantize:
        assert re.search(r"\bSTG\.E\S*\.128\b", text)
        assert re.search(r"\bLDG\.E\S*\.(64|128)\b", text)
