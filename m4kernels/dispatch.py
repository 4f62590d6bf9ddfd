"""Backends: which exist, which can run a call, and how one is chosen.

A backend of an op is the module `m4kernels.ops.<op>.<backend>`, imported when first used; backend.py says what it has.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch

from m4kernels import _ext
from m4kernels.backend import Backend, Call, check_backend, runs_always

ENVIRONMENT_VARIABLE = "M4KERNELS_BACKEND"
AUTO = "auto"  # names the automatic choice, whatever the environment variable says
_log = logging.getLogger("m4kernels")
B = TypeVar("B", bound=Backend)


class Kind(NamedTuple):
    """Where backends of one kind run.

    Args:
        devices: the types of device, the usual one first; empty for all.
        chosen_on: those on which the automatic choice considers it. Triton's interpreter, which runs on the CPU, shows
            what a kernel computes a thousand times slower, so there it must be named.
        lacking: what this machine lacks to run it on a device, or None.
    """

    devices: tuple[str, ...]
    chosen_on: tuple[str, ...]
    lacking: Callable[[torch.device], str | None]


def unavailable(backend: str, device: torch.device | str) -> str | None:
    """Why `backend` cannot run on tensors of a device of this machine; None when it can.

    Args:
        device: "cuda" is the current GPU. GPUs of one machine may differ.
    """
    kind, device = KINDS[backend], torch.device(device)
    if kind.devices and device.type not in kind.devices:
        return f"it runs on {' and '.join(kind.devices).upper()} tensors, got {device.type} tensors"
    return kind.lacking(device)


def usual_device(backend: str) -> str:
    """The type of device on which to ask for a backend: the first of its own that this machine has, else the first."""
    devices = KINDS[backend].devices or ("cpu",)
    return next((device for device in devices if device == "cpu" or torch.cuda.is_available()), devices[0])


def _lacks_nothing(_device: torch.device) -> None:
    return None


def _lacks_extension(_device: torch.device) -> str | None:
    return None if _ext.load() is not None else _ext.absent()


def _lacks_triton(device: torch.device) -> str | None:
    if not _has_triton():
        return "triton is not installed: `pip install triton`"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on CUDA tensors, or on CPU tensors with TRITON_INTERPRET=1 set; got cpu tensors"
    return None


def _lacks_cuda(device: torch.device) -> str | None:
    extension = _ext.load()
    if extension is None:
        return _ext.absent()
    if not extension.has_cuda:
        return "the extension was built without CUDA: install nvcc, then `M4KERNELS_CUDA=1 pip install -e .`"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return _gpu_unfit(torch.cuda.current_device() if device.index is None else device.index)


# Fastest first.
KINDS = {
    "cuda": Kind(("cuda",), ("cuda",), _lacks_cuda),
    "triton": Kind(("cuda", "cpu"), ("cuda",), _lacks_triton),
    "cpp": Kind(("cpu",), ("cpu",), _lacks_extension),
    "reference": Kind((), ("cuda", "cpu"), _lacks_nothing),
}
BACKENDS = tuple(KINDS)


@functools.cache
def _gpu_unfit(index: int) -> str | None:
    """Why the CUDA kernels of the extension cannot run on the GPU of a number; None when they can."""
    extension = _ext.require()
    capability = torch.cuda.get_device_capability(index)
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


class Dispatcher(Generic[B]):
    """Chooses the backend module of one op.

    Args:
        op: the op's folder in `m4kernels/ops`.
        backends: those that the op has, fastest first; the last is "reference".
        protocol: B, the class that says what each of them must have.
    """

    def __init__(self, op: str, backends: tuple[str, ...], protocol: Any) -> None:
        self.op = op
        self.backends = backends
        self.protocol = protocol
        self._modules: dict[str, B] = {}
        self._settled: dict[tuple[str, torch.device], B] = {}
        self._said: set[str] = set()

    def module(self, backend: str) -> B:
        """The backend's module, imported and checked on first use.

        Raises:
            TypeError: it lacks what the op's protocol names.
        """
        if backend not in self._modules:
            module = importlib.import_module(f"m4kernels.ops.{self.op}.{backend}")
            check_backend(module, self.protocol)
            self._modules[backend] = cast(B, module)
        return self._modules[backend]

    def reason(self, backend: str, call: Call) -> str | None:
        """Why `backend` cannot run this call of the op; None when it can."""
        if backend not in self.backends:
            return f"{self.op} has no such backend"
        return unavailable(backend, call.device) or self.module(backend).can_run(call)

    def named(self, backend: str) -> str:
        """``backend``, or with "" what `M4KERNELS_BACKEND` names for this op: an op that has no such backend at all
        chooses automatically. (Named in a call, such a backend is an error.)"""
        named = backend or os.environ.get(ENVIRONMENT_VARIABLE, "")
        return AUTO if not backend and named in BACKENDS and named not in self.backends else named

    def select(self, backend: str, call: Call) -> B:
        """The module of `backend`; with "" of the one that `M4KERNELS_BACKEND` names; of the fastest that can run where
        neither names one, or "auto".

        Raises:
            ValueError: the name is unknown, or the named backend cannot run this call.
        """
        named, device = self.named(backend), call.device
        settled = self._settled.get((named, device))
        if settled is not None:
            return settled
        name = self._choose(named, backend, call)
        module = self.module(name)
        # A slower backend that stood in for one which refused these arguments is no answer for others.
        if module.can_run is runs_always and (_is_name(named) or name == self.candidates(device.type)[0]):
            self._settled[named, device] = module
        return module

    def candidates(self, device_type: str) -> tuple[str, ...]:
        """What the automatic choice considers, fastest first."""
        considered = [name for name in self.backends if device_type in KINDS[name].chosen_on]
        return tuple(considered) or ("reference",)

    def _choose(self, named: str, backend: str, call: Call) -> str:
        if _is_name(named):
            if named not in BACKENDS:
                origin = "backend" if backend else ENVIRONMENT_VARIABLE
                raise ValueError(
                    f"{self.op}: {origin}={named!r} is unknown; expected one of {', '.join(self.backends)}, or auto"
                )
            why_not = self.reason(named, call)
            if why_not is not None:
                usable = [name for name in self.backends if self.reason(name, call) is None]
                raise ValueError(
                    f"{self.op}: backend {named!r} cannot run: {why_not}. Usable here: {', '.join(usable)}"
                )
            return named
        for name in self.candidates(call.device.type):
            why_not = self.reason(name, call)
            if why_not is None:
                return name
            self._say_once(name, why_not)
        raise AssertionError(f"{self.op}: the reference backend refused")  # can_run of a reference is always None

    def _say_once(self, backend: str, why_not: str) -> None:
        if f"{backend}: {why_not}" not in self._said:
            self._said.add(f"{backend}: {why_not}")
            _log.warning("%s: skipping the faster backend %r: %s", self.op, backend, why_not)


def _is_name(backend: Any) -> bool:
    return backend not in ("", AUTO)
