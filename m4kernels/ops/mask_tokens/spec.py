"""MaskingSpec: what mask_tokens draws from."""

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_MODALITIES = 256  # the random numbers' counter has 8 bits for the modality ...
MAX_SEQ_LEN = 2**18  # ... and 16 for the block of four positions
MAX_BUDGET = 2**31 - 1
NEVER_ALPHA = 1e-6  # an alpha up to this means "never", as 0 does
MIN_ALPHA, MAX_ALPHA = 0.01, 1000.0


@dataclass(frozen=True)
class MaskingSpec:
    """How many tokens of which modality are shown and how many are to be predicted.

    Args:
        max_seq_lens: tokens of each of the M modalities in a full sample; 1 to 2**18 each, M up to 256.
        input_alphas: Dirichlet concentrations of the inputs, one a modality: 0.01 to 1000, or 0 for "never" (up to
            1e-6 counts as 0).
        target_alphas: likewise of the targets.
        input_tokens_range: (fewest, most) input tokens to draw, both ends included. Fewer come out where a modality
            has fewer tokens than its share.
        target_tokens_range: likewise of the targets, which also make way for the inputs.

    Raises:
        ValueError: lists of different lengths, a value out of its range, a range upside down, no positive alpha.
    """

    max_seq_lens: tuple[int, ...]
    input_alphas: tuple[float, ...]
    target_alphas: tuple[float, ...]
    input_tokens_range: tuple[int, int]
    target_tokens_range: tuple[int, int]

    def __post_init__(self) -> None:
        lens = _integers("max_seq_lens", self.max_seq_lens)
        if not 1 <= len(lens) <= MAX_MODALITIES:
            raise ValueError(f"MaskingSpec: max_seq_lens must name 1 to {MAX_MODALITIES} modalities, got {len(lens)}")
        if not all(1 <= n <= MAX_SEQ_LEN for n in lens):
            raise ValueError(f"MaskingSpec: max_seq_lens must be 1 to {MAX_SEQ_LEN} each, got {list(lens)}")
        object.__setattr__(self, "max_seq_lens", lens)
        for name in ("input_alphas", "target_alphas"):
            object.__setattr__(self, name, _alphas(name, getattr(self, name), len(lens)))
        for name in ("input_tokens_range", "target_tokens_range"):
            ends = _integers(name, getattr(self, name))
            if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= MAX_BUDGET:
                raise ValueError(
                    f"MaskingSpec: {name} must be two integers (fewest, most), 0 <= fewest <= most <= {MAX_BUDGET}, "
                    f"got {list(ends)}"
                )
            object.__setattr__(self, name, ends)

    @property
    def num_modalities(self) -> int:
        return len(self.max_seq_lens)

    @functools.cached_property
    def num_tokens(self) -> int:
        """L, the tokens of a full sample."""
        return sum(self.max_seq_lens)


def _numbers(name: str, values: object, kind: Callable[[Any], Any], what: str) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"MaskingSpec: {name} must be a list of {what}, got {values!r}")
    listed = list(values)
    if any(isinstance(value, (bool, str)) for value in listed):
        raise ValueError(f"MaskingSpec: {name} must be {what}, got {listed}")
    try:
        return tuple(kind(value) for value in listed)
    except TypeError:
        raise ValueError(f"MaskingSpec: {name} must be {what}, got {listed}") from None


def _integers(name: str, values: object) -> tuple[int, ...]:
    return _numbers(name, values, operator.index, "integers")


def _alphas(name: str, values: object, modalities: int) -> tuple[float, ...]:
    alphas = _numbers(name, values, float, "numbers")
    if len(alphas) != modalities:
        raise ValueError(
            f"MaskingSpec: {name} has {len(alphas)} values, but max_seq_lens has {modalities}: one a modality is needed"
        )
    for alpha in alphas:
        if not (0 <= alpha <= NEVER_ALPHA or MIN_ALPHA <= alpha <= MAX_ALPHA):
            raise ValueError(
                f"MaskingSpec: {name} must be {MIN_ALPHA} to {MAX_ALPHA:g} each, or 0 for never, got {list(alphas)}"
            )
    if max(alphas) <= NEVER_ALPHA:
        raise ValueError(f"MaskingSpec: {name} must have a positive value (0 means never), got {list(alphas)}")
    return tuple(0.0 if alpha <= NEVER_ALPHA else alpha for alpha in alphas)
