"""How many tokens each decoding step keeps, and how hot it draws."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")
# Share of the tokens that is known after a share t of the steps. What a step adds is the same in all, grows in
# proportion to the steps before, or grows at first and levels off (MaskGIT's cosine; its "square" is our linear).
_KNOWN = {"constant": lambda t: t, "linear": lambda t: t * t, "cosine": lambda t: 1 - math.cos(math.pi / 2 * t)}
# Share of the temperature that is left after a share t of the steps.
_HEAT = {"constant": lambda t: 1.0, "linear": lambda t: 1 - t, "cosine": lambda t: math.cos(math.pi / 2 * t)}


def tokens_kept(total: int, steps: int, schedule: str) -> list[int]:
    """Tokens that each of ``steps`` steps keeps: at least one each, ``total`` in all.

    Raises:
        ValueError: there are more steps than tokens.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps: expected 1 … {total}, at most one for each token, got {steps}")
    kept, done = [], 0
    for step in range(1, steps + 1):
        aim = math.ceil(total * _KNOWN[schedule](step / steps) - 1e-9)  # a share that is whole but for its rounding
        until = total if step == steps else min(max(aim, done + 1), total - (steps - step))
        kept.append(until - done)
        done = until
    return kept


def temperatures(temperature: float, steps: int, schedule: str) -> list[float]:
    """The temperature of each step, from ``temperature`` in the first downwards."""
    return [temperature * _HEAT[schedule](step / steps) for step in range(steps)]
