"""`python -m m4kernels`: what is installed, which backend runs which op here and why not; for bug reports."""

import importlib.util
import pkgutil
import platform
from importlib import metadata

import torch

import m4kernels.ops
from m4kernels import __version__, _ext
from m4kernels.dispatch import BACKENDS, unavailable


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _backend_report(op: str, backend: str) -> str:
    if importlib.util.find_spec(f"m4kernels.ops.{op}.{backend}") is None:
        return "no: this op has no such backend yet"
    device = "cpu" if backend in ("reference", "cpp") else "cuda"
    if backend == "triton" and not torch.cuda.is_available():
        device = "cpu"
    reason = unavailable(backend, device)
    return "yes" if reason is None else f"no: {reason}"


def main() -> None:
    """Print the report."""
    print(f"m4kernels {__version__}   Python {platform.python_version()}   {platform.platform()}")
    print("   ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy", "pybind11")))
    extension = _ext.load()
    if extension is None:
        print(f"extension: {_ext.ABSENT}")
    else:
        archs = ", ".join(f"sm_{arch}" for arch in extension.cuda_archs.split(";"))
        cuda = f"CUDA {extension.cuda_version} built in ({archs})" if extension.has_cuda else "CUDA not built in"
        print(f"extension: {extension.__file__}, {cuda}")
        print(f"SIMD level: {extension.simd_level()}")
    print(f"threads: {torch.get_num_threads()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(
                f"GPU {i}: {torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            )
    else:
        print("GPU: none that torch can use")
    for op in sorted(module.name for module in pkgutil.iter_modules(m4kernels.ops.__path__)):
        print(f"{op}")
        for backend in BACKENDS:
            print(f"  {backend:<10} {_backend_report(op, backend)}")


if __name__ == "__main__":
    main()
