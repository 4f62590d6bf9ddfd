"""What a backend is: the module `m4kernels.ops.<op>.<backend>` with the functions that the op's protocol names.

An op states its protocol, a subclass of `Backend`, beside its call objects in `ops/<op>/arguments.py`. A module is held
to it once, when it is first loaded.
"""

import inspect
from types import ModuleType
from typing import Any, Protocol

import torch


class Call(Protocol):
    """One call of an op: its arguments under their names, as every backend receives them."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes or devices do not fit; reads no values."""


class Backend(Protocol):
    """What every backend has."""

    def can_run(self, call: Any) -> str | None:
        """None when it can run this call, whose device fits; else the reason why not."""


def runs_always(call: Any) -> None:
    """`can_run` of a backend that runs whatever the op accepts. Where the device has it, it is not asked again."""


def check_backend(module: ModuleType, protocol: type[Backend]) -> None:
    """Hold a module to a protocol: the functions and their parameters by name and order; a leading underscore marks one
    that this backend does not use.

    Raises:
        TypeError: a function is missing or takes other parameters; the message names each.
    """
    faults = []
    for base in reversed(protocol.__mro__):
        for name, member in vars(base).items():
            if name.startswith("_") or not inspect.isfunction(member):
                continue
            wanted = list(inspect.signature(member).parameters)[1:]  # without self
            function = getattr(module, name, None)
            if not callable(function):
                faults.append(f"it lacks {name}({', '.join(wanted)})")
                continue
            found = [parameter.lstrip("_") for parameter in inspect.signature(function).parameters]
            if found != wanted:
                faults.append(f"{name} takes ({', '.join(found)}), expected ({', '.join(wanted)})")
    if faults:
        raise TypeError(f"{module.__name__} is no {protocol.__name__}: {'; '.join(faults)}")
