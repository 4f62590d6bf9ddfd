"""How modalities are filled in."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from m4.config import TrainConfig
from m4.generation.schedules import SCHEDULES

ORDERS = ("confidence", "random")
STEPS = 12
MAX_SEED = 2**64 - 1
MAX_TEMPERATURE = 1_000_000  # ids are long since equally likely, and float32 still holds the noise beside -inf
MAX_GUIDANCE = 1000.0
MAX_TOP_K = 2**31 - 1


def default_steps(config: TrainConfig, wanted: Collection[str], tokens: int) -> int:
    """Forward passes for so many tokens of the modalities ``wanted`` where nothing else is asked for.

    One where the masks of training never showed any of them (`input_alphas` 0): later steps would read, untrained, what
    the first filled in. Drawn next poses of such a run were further off for it (docs/learning.md).
    """
    shown = any(alpha > 0 for name, alpha in zip(config.modalities, config.input_alphas, strict=True) if name in wanted)
    return min(STEPS, tokens) if shown else 1


@dataclass(frozen=True)
class Decoding:
    """The settings of `m4.generation.decode.generate`.

    Args:
        steps: forward passes; at most one for each token to be predicted.
        schedule: how many tokens a step keeps: "constant" as many in each; "linear" in proportion to the steps before;
            "cosine" few at first, then more (MaskGIT).
        order: which tokens a step keeps: of highest "confidence", or a "random" order.
        temperature: 0 takes the likeliest id, or the median of a scale. Above, ids are drawn from the distribution
            ∝ p^(1 / temperature), and with order "confidence" noise of that size is added to the log-probabilities that
            decide the order.
        temperature_schedule: "constant", or falling towards 0 over the steps: "linear", "cosine".
        top_k: draw among so many likeliest ids; None: all.
        top_p: draw among the fewest likeliest ids that together have this probability (at the temperature), at least
            one; 1: all.
        guidance: classifier-free guidance G: logits are u + G (c - u), with those given what is known (c) and those
            given only what has been predicted so far (u); 1: c.
        seed: decides, together with a sample's id, what is drawn.
    Raises:
        ValueError: a value is out of range; the message begins with its name.
    """

    steps: int = STEPS
    schedule: str = "cosine"
    order: str = "confidence"
    temperature: float = 0.0
    temperature_schedule: str = "linear"
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("schedule", SCHEDULES), ("order", ORDERS), ("temperature_schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        limits = (
            ("temperature", 0, MAX_TEMPERATURE),
            ("top_k", 1, MAX_TOP_K),
            ("top_p", 0, 1),
            ("guidance", 0, MAX_GUIDANCE),
            ("seed", 0, MAX_SEED),
        )
        for name, lowest, highest in limits:
            value = getattr(self, name)
            if value is not None and not (lowest <= value <= highest and math.isfinite(value)):
                raise ValueError(f"{name}: expected {lowest} … {highest}, got {value}")
