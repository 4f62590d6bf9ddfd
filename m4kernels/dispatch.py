"""Backends: which exist, which can run a call, and how one is chosen.

A backend of an op is the module `m4kernels.ops.<op>.<backend>`, imported when first used. It has the op's functions and
`can_run(*args) -> str | None`: None when it can run these arguments, else the reason why not.
"""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import Any

import torch

from m4kernels import _ext

BACKENDS = ("cuda", "triton", "cpp", "reference")
# What the automatic choice considers on a device. Triton's interpreter, which runs on the CPU, shows what a kernel
# computes a thousand times slower, so there it must be named.
_CANDIDATES = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
ENVIRONMENT_VARIABLE = "M4KERNELS_BACKEND"
_log = logging.getLogger("m4kernels")


def unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on tensors of `device_type` on this machine; None when it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device_type != "cpu":
            return f"it runs on CPU tensors, got {device_type} tensors"
        return None if _ext.load() is not None else _ext.absent()
    if backend == "triton":
        if not _has_triton():
            return "triton is not installed: `pip install triton`"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it runs on CUDA tensors, or on CPU tensors with TRITON_INTERPRET=1 set; got cpu tensors"
        return None
    if device_type != "cuda":
        return f"it runs on CUDA tensors, got {device_type} tensors"
    extension = _ext.load()
    if extension is None:
        return _ext.absent()
    if not extension.has_cuda:
        return "the extension was built without CUDA: install nvcc, then `M4KERNELS_CUDA=1 pip install -e .`"
    return _gpu_unfit()


@functools.cache
def _gpu_unfit() -> str | None:
    """Why the CUDA kernels of the extension cannot run on the current GPU; None when they can."""
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    extension = _ext.require()
    capability = torch.cuda.get_device_capability()
    return gpu_mismatch(extension.cuda_version, extension.cuda_archs, extension.cuda_driver_version(), capability)


def gpu_mismatch(toolkit: str, archs: str, driver: int, capability: tuple[int, int]) -> str | None:
    """Why kernels built with a CUDA toolkit ("13.0") for `archs` ("80;90", the last also as PTX) cannot run on a GPU.

    Args:
        toolkit: version of the toolkit.
        archs: architectures that the kernels were built for.
        driver: the newest CUDA that the driver supports, such as 13000 for 13.0.
        capability: the GPU's compute capability.

    Returns:
        The reason, or None when they can run.
    """
    if driver // 1000 < int(toolkit.split(".")[0]):
        return (
            f"the extension was built with CUDA {toolkit}, but the driver supports only CUDA {driver // 1000}."
            f"{driver % 1000 // 10}: update the driver, or build with an older toolkit"
        )
    built = [int(arch) for arch in archs.split(";")]
    gpu = 10 * capability[0] + capability[1]
    # Machine code runs on GPUs of the same major version and a minor version as high; PTX on all that are as new.
    if any(arch // 10 == capability[0] and arch <= gpu for arch in built) or built[-1] <= gpu:
        return None
    return (
        f"the extension was built for sm_{', sm_'.join(archs.split(';'))}, but the GPU is an sm_{gpu}: "
        f"`M4KERNELS_CUDA_ARCHS={gpu} pip install -e .`"
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_always(*_args: object) -> None:
    """`can_run` of a backend that runs whatever the op accepts. Where the device has it, it is not asked again."""


class Dispatcher:
    """Chooses the backend module of one op.

    Args:
        op: the op's folder in `m4kernels/ops`.
        backends: those that the op has, fastest first; the last is "reference".
    """

    def __init__(self, op: str, backends: tuple[str, ...]) -> None:
        self.op = op
        self.backends = backends
        self._modules: dict[str, ModuleType] = {}
        self._settled: dict[tuple[str, torch.device], ModuleType] = {}
        self._said: set[str] = set()

    def module(self, backend: str) -> ModuleType:
        """The backend's module, imported on first use."""
        if backend not in self._modules:
            self._modules[backend] = importlib.import_module(f"m4kernels.ops.{self.op}.{backend}")
        return self._modules[backend]

    def reason(self, backend: str, *args: Any) -> str | None:
        """Why `backend` cannot run the op on these arguments (the first is a tensor); None when it can."""
        if backend not in self.backends:
            return f"{self.op} has no such backend"
        return unavailable(backend, args[0].device.type) or self.module(backend).can_run(*args)

    def select(self, backend: str, *args: Any) -> ModuleType:
        """The module of `backend`, or with "" of the one `M4KERNELS_BACKEND` names, else of the fastest that can run.

        Raises:
            ValueError: the name is unknown, or the named backend cannot run these arguments.
        """
        named = backend or os.environ.get(ENVIRONMENT_VARIABLE, "")
        settled = self._settled.get((named, args[0].device))
        if settled is not None:
            return settled
        name = self._choose(named, backend, args)
        module = self.module(name)
        # A slower backend that stood in for one which refused these arguments is no answer for others.
        if module.can_run is runs_always and (named or name == self._candidates(args[0].device.type)[0]):
            self._settled[named, args[0].device] = module
        return module

    def _candidates(self, device_type: str) -> tuple[str, ...]:
        """What the automatic choice considers, fastest first."""
        return tuple(name for name in _CANDIDATES.get(device_type, ("reference",)) if name in self.backends)

    def _choose(self, named: str, backend: str, args: tuple[Any, ...]) -> str:
        if named:
            if named not in BACKENDS:
                origin = "backend" if backend else ENVIRONMENT_VARIABLE
                raise ValueError(
                    f"{self.op}: {origin}={named!r} is unknown; expected one of {', '.join(self.backends)}"
                )
            why_not = self.reason(named, *args)
            if why_not is not None:
                usable = [name for name in self.backends if self.reason(name, *args) is None]
                raise ValueError(
                    f"{self.op}: backend {named!r} cannot run: {why_not}. Usable here: {', '.join(usable)}"
                )
            return named
        device_type = args[0].device.type
        for name in self._candidates(device_type):
            why_not = unavailable(name, device_type) or self.module(name).can_run(*args)
            if why_not is None:
                return name
            self._say_once(name, why_not)
        raise AssertionError(f"{self.op}: the reference backend refused")  # can_run of a reference is always None

    def _say_once(self, backend: str, why_not: str) -> None:
        if f"{backend}: {why_not}" not in self._said:
            self._said.add(f"{backend}: {why_not}")
            _log.warning("%s: skipping the faster backend %r: %s", self.op, backend, why_not)
