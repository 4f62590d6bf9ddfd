"""The CUDA sources compiled without a GPU: what of their claims the machine code shows."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_tokens_are_written_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    """nvcc splits a plain assignment of two 8-byte words."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    knobs = pytest.importorskip("triton.knobs", reason="cuobjdump comes with Triton")
    source, cubin = REPOSITORY / "csrc/quantize_coords/quantize_coords_cuda.cu", tmp_path / "quantize.cubin"
    flags = ["-std=c++20", "-O3", "--fmad=false", "-arch=sm_90", "-cubin", f"-I{REPOSITORY / 'csrc'}"]
    subprocess.run([nvcc, *flags, source, "-o", cubin], check=True, timeout=240)
    code = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    kernels = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", code, re.DOTALL))
    quantize = [text for name, text in kernels.items() if "dequantize" not in name]
    assert len(quantize) == 2  # float32 and float64 coordinates
    for text in quantize:
        assert re.search(r"\bSTG\.E\S*\.128\b", text)
        assert re.search(r"\bLDG\.E\S*\.(64|128)\b", text)
