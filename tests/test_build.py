"""The build script's decisions, without compiling: what it builds, and what it refuses with which words."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with setuptools.setup switched off and no CUDA setting inherited."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("M4KERNELS_CUDA", "M4KERNELS_CUDA_ARCHS", "NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(REPOSITORY)
    spec = importlib.util.spec_from_file_location("m4_setup", REPOSITORY / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc that knows three architectures."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_90\\ncompute_100\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return nvcc


def test_cuda_is_built_when_nvcc_is_found(build: ModuleType, fake_nvcc: Path) -> None:
    assert build.cuda_plan([Path("a_cuda.cu")]) == (str(fake_nvcc), [80, 90, 100])


def test_cuda_architectures_from_the_environment(
    build: ModuleType, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M4KERNELS_CUDA_ARCHS", "90")
    assert build.cuda_plan([Path("a_cuda.cu")]) == (str(fake_nvcc), [90])
    monkeypatch.setenv("M4KERNELS_CUDA_ARCHS", "70;90")
    with pytest.raises(SystemExit, match=r"does not know \[70\]; it knows \[80, 90, 100\]"):
        build.cuda_plan([Path("a_cuda.cu")])
    monkeypatch.setenv("M4KERNELS_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="expected architecture numbers"):
        build.cuda_plan([Path("a_cuda.cu")])


def test_cuda_can_be_switched_off(build: ModuleType, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M4KERNELS_CUDA", "0")
    assert build.cuda_plan([Path("a_cuda.cu")]) is None


def test_cuda_demanded_without_nvcc_is_an_error(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    assert build.cuda_plan([Path("a_cuda.cu")]) is None  # auto: says so and goes on
    monkeypatch.setenv("M4KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found: install the CUDA toolkit, or set NVCC or CUDA_HOME"):
        build.cuda_plan([Path("a_cuda.cu")])
    monkeypatch.setenv("M4KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="M4KERNELS_CUDA='yes': expected 0, 1 or auto"):
        build.cuda_plan([Path("a_cuda.cu")])


def test_compiler_failure_is_one_clear_error(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/bin/false", "M4KERNELS_CUDA": "0"}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(tmp_path / "t"),
        "--build-lib",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "error: compilation failed (see above); a C++20 compiler with OpenMP is needed" in result.stderr


def test_sources_that_need_a_simd_level_say_so_in_their_name() -> None:
    for path in REPOSITORY.glob("csrc/**/*.cpp"):
        uses_level = "M4K_SIMD_NS" in path.read_text()
        assert uses_level == path.name.endswith("_cpu.cpp"), path
