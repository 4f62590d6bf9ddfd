"""`python -m m4kernels`: what is installed, which backend runs which op here and why not; for bug reports.

What is broken is told in a line of its own and does not end the report; then the exit status is 1.
"""

import argparse
import importlib.util
import os
import pkgutil
import platform
import sys
from collections.abc import Callable
from importlib import metadata

import torch

import m4kernels.ops
from m4kernels import __version__, _ext
from m4kernels.dispatch import BACKENDS, unavailable, usual_device
from m4kernels.ops.linear.api import FEWEST_ROWS, NARROWEST, why_not_own_products
from m4kernels.processor import dots_bf16


def _versions() -> str:
    return "   ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy", "pybind11"))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    extension = _ext.load()
    if extension is None:
        return _ext.absent()
    archs = ", ".join(f"sm_{arch}" for arch in extension.cuda_archs.split(";"))
    cuda = f"CUDA {extension.cuda_version} built in ({archs})" if extension.has_cuda else "CUDA not built in"
    emulated = ", AVX-512 in software: for tests" if extension.emulates_avx512 else ""
    return f"{extension.__file__}, {cuda}\nSIMD level: {extension.simd_level()}{emulated}"


def _products(dtype: torch.dtype) -> str:
    """What multiplies numbers of a dtype in the layers of a model on this CPU."""
    try:
        why_not = why_not_own_products(dtype)
    except ImportError:
        return "PyTorch's: the extension is broken (see above)"
    if why_not is not None:
        return f"PyTorch's: {why_not}"
    if dtype == torch.bfloat16 and not dots_bf16():
        return "the extension's (backend cpp of linear), as float32"
    return f"the extension's (backend cpp of linear) from {FEWEST_ROWS} rows on where K and N are {NARROWEST} or more"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return "\n".join(
        f"{i}: {torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    )


def _backend(op: str, backend: str) -> str:
    if importlib.util.find_spec(f"m4kernels.ops.{op}.{backend}") is None:
        return "no: this op has no such backend yet"
    try:
        reason = unavailable(backend, usual_device(backend))
    except ImportError:
        reason = "the extension is broken (see above)"
    return "yes" if reason is None else f"no: {reason}"


def main() -> int:
    """The command: it has no options."""
    prog = "m4 kernels" if sys.argv[0] == "m4 kernels" else "python -m m4kernels"
    what = "Which kernels run here and why not: versions, extension, GPUs, every op and backend; for bug reports."
    argparse.ArgumentParser(prog=prog, description=what).parse_args()
    return report()


def report() -> int:
    """Print the report; 1 when a part of it could only say what is broken, else 0."""
    broken = 0

    def tell(label: str, part: Callable[[], str]) -> None:
        nonlocal broken
        try:
            text = part()
        except Exception as error:  # whatever it is: this report is how users tell us
            broken = 1
            text = f"BROKEN: {type(error).__name__}: {error}"
        print(f"{label}{text}")

    print(f"m4kernels {__version__}   Python {platform.python_version()}   {platform.platform()}")
    tell("", _versions)
    tell("extension: ", _extension)
    tell("threads: ", lambda: str(torch.get_num_threads()))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        tell(f"products of layers on the CPU, {name}: ", lambda dtype=dtype: _products(dtype))  # type: ignore[misc]
    tell("GPU: ", _gpus)
    for op in sorted(module.name for module in pkgutil.iter_modules(m4kernels.ops.__path__)):
        print(op)
        for backend in BACKENDS:
            tell(f"  {backend:<10} ", lambda op=op, backend=backend: _backend(op, backend))  # type: ignore[misc]
    return broken


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `python -m m4kernels | head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
