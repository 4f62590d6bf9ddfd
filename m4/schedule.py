"""What a configuration comes to: steps, samples a step, what is due when, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from m4.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The run in optimiser steps. Counted tokens are in millions."""

    accumulation: int  # forward passes a step and device
    samples_per_step: int  # over all devices
    steps: int
    tokens_per_sample: int

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> Schedule:
        """Accumulate to the multiple of ``batch_size · world_size`` nearest to ``global_batch_size``, at least one."""
        accumulation = max(1, round(config.global_batch_size / (config.batch_size * world_size)))
        samples = accumulation * config.batch_size * world_size
        return cls(accumulation, samples, math.ceil(config.total_samples / samples), config.num_tokens_per_sample)

    @property
    def samples(self) -> int:
        """Samples of the whole run; the last step is whole too, so up to a step more than ``total_tokens`` say."""
        return self.steps * self.samples_per_step

    def tokens(self, samples: int) -> float:
        """Counted tokens (millions) of a number of samples."""
        return samples * self.tokens_per_sample / 1e6

    def due(self, every: float, step: int) -> bool:
        """Whether the counted tokens pass a multiple of ``every`` millions in the step that ends at ``step``."""
        after, before = self.tokens(step * self.samples_per_step), self.tokens((step - 1) * self.samples_per_step)
        return step > 0 and math.floor(after / every) > math.floor(before / every)


def learning_rate(tokens: float, config: TrainConfig) -> float:
    """Linear from 0 to ``lr`` over ``token_warmup``, then a cosine to ``min_lr`` at ``total_tokens``.

    Args:
        tokens: counted tokens seen, in millions; beyond ``total_tokens`` the rate stays at ``min_lr``.
    """
    if tokens < config.token_warmup:
        return config.lr * tokens / config.token_warmup
    progress = min(1.0, (tokens - config.token_warmup) / (config.total_tokens - config.token_warmup))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * progress))
