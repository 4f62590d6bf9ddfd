"""Rolling a motion out: the predicted next moment becomes the reference of the one after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m4.errors import ConfigError
from m4.generation.decode import generate
from m4.generation.estimates import CodeValues
from m4.generation.options import Decoding
from m4.modalities import NEXT, REFERENCE, SUCCESSORS, RowLayout
from m4.model import M4

_PREDECESSORS = {following: reference for reference, following in SUCCESSORS.items()}


def check_rollout(layout: RowLayout, given: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise ConfigError unless the next moment is wanted, given nothing but the reference, and can be fed back."""
    if set(wanted) - set(NEXT):
        raise ConfigError(f"--rollout: expected --wanted of {', '.join(NEXT)}, got {', '.join(wanted)}")
    if set(given) - set(REFERENCE):
        raise ConfigError(f"--rollout: expected --given of {', '.join(REFERENCE)}, got {', '.join(given)}")
    for name in wanted:
        back = _PREDECESSORS[name]
        if back not in layout.modalities or layout[back].shape != layout[name].shape:
            raise ConfigError(f"--rollout: {name} is fed back as {back}, which this run does not have in that shape")


def roll_out(
    model: M4,
    tokens: Tensor,
    moments: int,
    *,
    given: Sequence[str],
    wanted: Sequence[str],
    id_limits: Tensor,
    ordinal: Tensor,
    decoding: Decoding,
    sample_ids: Tensor,
    code_values: CodeValues | None = None,
) -> Tensor:
    """Predict so many moments, each from the one before.

    Args:
        tokens: int64 (B, L); the first moment is predicted from ``given``.
        wanted: of the next moment; from the second moment on what was predicted is given, and nothing else.
        others: as in `m4.generation.decode.generate`.
    Returns:
        int64 (moments, B, L): the rows, with what each moment was predicted from as reference.
    """
    layout = RowLayout.of(model.config)
    options: dict[str, Any] = {
        "id_limits": id_limits,
        "ordinal": ordinal,
        "code_values": code_values,
        "decoding": decoding,
    }
    rows, found = tokens, []
    for moment in range(moments):
        rows = generate(model, rows, given=given, wanted=wanted, sample_ids=sample_ids, moment=moment, **options)
        found.append(rows)
        rows = rows.clone()
        for name in wanted:
            rows[:, layout.span(_PREDECESSORS[name])] = rows[:, layout.span(name)]
        given = [_PREDECESSORS[name] for name in wanted]
    return torch.stack(found)
