"""Where benchmarks run: on the GPU where there is one, else on the CPU."""

import dataclasses
import importlib
from typing import Any

import torch

from m4kernels.dispatch import Dispatcher, unavailable
from m4kernels.processor import slow_bf16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


class Unavailable(Exception):
    """A provider that this machine lacks; the message says why. Its tests are skipped."""


def require_bf16() -> None:
    """Raises Unavailable on a CPU that has no instructions for products of bfloat16."""
    if not ON_GPU and (why := slow_bf16()) is not None:
        raise Unavailable(f"bf16 is slow here: {why}")


def backends(op: str, device: torch.device = DEVICE) -> tuple[str, ...]:
    """The backends of an op that can run on a device, fastest first; the reference is the last."""
    dispatcher: Dispatcher = importlib.import_module(f"m4kernels.ops.{op}.api").dispatcher
    return tuple(name for name in dispatcher.candidates(device.type) if unavailable(name, device) is None)


def moved(value: Any, device: torch.device = DEVICE, dtype: torch.dtype | None = None) -> Any:
    """The value, with every tensor in it on the device and, if floating and `dtype` is given, in that dtype.

    Goes into lists, named tuples and dataclasses. Leaves that require gradients stay such leaves, and what is one
    object stays one.
    """
    return _moved(value, device, dtype, {})


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None, known: dict[int, Any]) -> Any:
    if id(value) not in known:
        known[id(value)] = _moved_once(value, device, dtype, known)
    return known[id(value)]


def _moved_once(value: Any, device: torch.device, dtype: torch.dtype | None, known: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        as_dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
        if value.device.type == device.type and value.dtype == as_dtype:
            return value
        return value.detach().to(device, as_dtype).requires_grad_(value.requires_grad)
    if isinstance(value, list):
        return [_moved(v, device, dtype, known) for v in value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(v, device, dtype, known) for v in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        fields = {name: _moved(getattr(value, name), device, dtype, known) for name in names}
        return dataclasses.replace(value, **fields)
    return value
