"""Arguments as nano4M's classes take them, from plain Python or out of OmegaConf."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from m4.model.config import ModelConfig

# Of token ids, positions and modalities.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16)


class Modalities(NamedTuple):
    """What both classes are told of the modalities."""

    names: list[str]
    vocab_sizes: list[int]
    max_seq_lens: list[int]


def read_modalities(modalities: Any, vocab_sizes: Any, max_seq_lens: Any) -> Modalities:
    """The three lists. Raises ValueError naming the argument: of wrong types, of different lengths, not positive."""
    names = _listed("modalities", modalities)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"modalities: expected a list of names, got {names!r}")
    sizes = [read_integer("vocab_sizes", size) for size in _listed("vocab_sizes", vocab_sizes)]
    lengths = [read_integer("max_seq_lens", length) for length in _listed("max_seq_lens", max_seq_lens)]
    ModelConfig(names, sizes, lengths)
    return Modalities(names, sizes, lengths)


def read_integer(name: str, value: Any) -> int:
    """An integer. Raises ValueError naming the argument."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected integers, got {value!r}") from None


def read_number(name: str, value: Any) -> float:
    """A number. Raises ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return float(value)


def read_flag(name: str, value: Any) -> bool:
    """True or False. Raises ValueError naming the argument."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a list, got {values!r}")
    return list(values)
