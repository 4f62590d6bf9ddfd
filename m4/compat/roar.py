"""How `FourM.generate_one_modality_roar` draws: random-order autoregressive decoding with nano4M's settings.

`m4.generation` is the place for everything else: other orders, schedules, guidance, draws that do not depend on what
else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How an id is drawn from logits.

    Args:
        temp: temperature; 0 takes the likeliest id.
        top_p: 0, or the share of the probability (at temperature 1) that the likeliest ids kept make up, the first that
            exceeds it included; 0 keeps all.
        top_k: an integer, the number of likeliest ids kept, or a fraction, their share of the vocabulary; 0 keeps all.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

    temp: float = 1.0
    top_p: float = 0.0
    top_k: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("temp", math.inf), ("top_p", 1.0), ("top_k", math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(
                    f"{name}: expected a number of at least 0{' and at most 1' * (most == 1)}, got {value!r}"
                )
        if not math.isfinite(self.temp):
            raise ValueError(f"temp: expected a finite number, got {self.temp}")
        if isinstance(self.top_k, float) and self.top_k > 1:
            raise ValueError(f"top_k: expected an integer, or a fraction of at most 1, got {self.top_k}")

    def kept(self, vocabulary: int) -> int:
        """How many ids `top_k` keeps of so many."""
        if self.top_k == 0:
            return vocabulary
        count = self.top_k if isinstance(self.top_k, int) else int(self.top_k * vocabulary)
        return max(1, min(count, vocabulary))


def roar_order(samples: int, length: int, device: torch.device) -> Tensor:
    """int64 (samples, length): a random order of the positions for each sample, of torch's random numbers."""
    return torch.rand((samples, length), device=device).argsort(dim=1)


def draw(logits: Tensor, rule: Draw) -> Tensor:
    """An id for every row of logits (T, V), int64 (T,), of torch's random numbers."""
    logits = logits.float()
    if rule.temp < 1e-10:
        return logits.argmax(-1)
    count = rule.kept(logits.shape[-1])
    if rule.top_p == 0 and count == logits.shape[-1]:
        return torch.multinomial((logits / rule.temp).softmax(-1), 1)[:, 0]
    ranked, ids = logits.topk(count)
    if rule.top_p > 0:
        p = ranked.softmax(-1)
        # An id stays where those before it do not exceed the share yet; the first always does.
        ranked = ranked.masked_fill(p.cumsum(-1) - p > rule.top_p, -torch.inf)
    place = torch.multinomial((ranked / rule.temp).softmax(-1), 1)
    return ids.gather(-1, place)[:, 0]
