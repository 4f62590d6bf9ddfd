"""Checks of single arguments that the ops share; every message begins with the `name` it is given."""

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def integer(name: str, value: Any) -> int:
    """An integer of Python or NumPy as an int; that of a tracer (SymInt) as it is.

    Raises:
        ValueError: it is none; a float of a whole value, a bool and a tensor are none either.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, np.bool_, Tensor)):
        raise ValueError(f"{name} must be an integer, got {_described(value)}")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {_described(value)}") from None


def number(name: str, value: Any) -> float:
    """A number of Python or NumPy as a float; infinite where a float cannot hold it.

    Raises:
        ValueError: it is none; a bool and a tensor are none either.
    """
    if type(value) is float:
        return value
    if isinstance(value, (bool, np.bool_, str, bytes, Tensor)):
        raise ValueError(f"{name} must be a number, got {_described(value)}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {_described(value)}") from None
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def tensor(name: str, value: Any) -> Tensor:
    """The value, which must be a tensor.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}: convert it with torch.as_tensor")
    return value


def is_integer_dtype(dtype: torch.dtype) -> bool:
    """Whether the dtype is of integers; bool is not."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}: convert it with .item(), which waits for a GPU"
    return f"{value!r} ({type(value).__name__})" if not isinstance(value, (float, bool)) else repr(value)
