"""What a recipe comes to: steps, samples a step, what is due when, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

ONE_TOKEN = 1e-6  # amounts of tokens are in millions
MOST_TOKENS = 1e12
MOST_SAMPLES = 2**20  # of a batch: the masks of a step are drawn together
MOST_STEPS = 99_999_999  # checkpoint folders have eight digits
FLOAT32 = (1e-37, 3e38)  # what float32 holds with all its digits


class Recipe(Protocol):
    """What of a configuration (`m4.config.TrainConfig`) a schedule needs; amounts of tokens in millions."""

    @property
    def batch_size(self) -> int: ...

    @property
    def global_batch_size(self) -> int: ...

    @property
    def num_tokens_per_sample(self) -> int: ...

    @property
    def total_tokens(self) -> float: ...

    @property
    def token_warmup(self) -> float: ...

    @property
    def lr(self) -> float: ...

    @property
    def min_lr(self) -> float: ...


@dataclass(frozen=True)
class Schedule:
    """The run in optimiser steps. Counted tokens are in millions."""

    accumulation: int  # forward passes a step and device
    samples_per_step: int  # over all devices
    steps: int
    tokens_per_sample: int

    @classmethod
    def of(cls, recipe: Recipe, world_size: int) -> Schedule:
        """Accumulate to the multiple of ``batch_size · world_size`` nearest to ``global_batch_size``, at least one.

        Raises:
            ValueError: a number is out of range; the message begins with its name.
        """
        for name in ("batch_size", "global_batch_size"):
            if not 1 <= getattr(recipe, name) <= MOST_SAMPLES:
                raise ValueError(f"{name} must be above 0 and at most {MOST_SAMPLES:,}, got {getattr(recipe, name)}")
        accumulation = max(1, round(recipe.global_batch_size / (recipe.batch_size * world_size)))
        samples = accumulation * recipe.batch_size * world_size
        steps = math.ceil(total_samples(recipe) / samples)
        if steps > MOST_STEPS:
            raise ValueError(
                f"total_tokens must make at most {MOST_STEPS:,} steps, got {recipe.total_tokens:g}, which makes "
                f"{steps:,} steps of {samples} samples; raise global_batch_size"
            )
        return cls(accumulation, samples, steps, recipe.num_tokens_per_sample)

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

    def next_due(self, every: float, step: int) -> int:
        """The first step after ``step`` at whose end something is `due`, or the last of the run."""
        passed = math.floor(self.tokens(step * self.samples_per_step) / every)
        guess = math.ceil((passed + 1) * every / self.tokens(self.samples_per_step))
        near = range(max(guess - 1, step + 1), guess + 2)  # rounding
        return min(next((later for later in near if self.due(every, later)), guess), self.steps)


@dataclass(frozen=True)
class LearningRate:
    """Linear from 0 to ``lr`` over ``token_warmup``, then a cosine to ``min_lr`` at ``total_tokens`` (in millions).

    Raises:
        ValueError: a number is out of range; the message begins with its name.
    """

    lr: float
    min_lr: float
    token_warmup: float
    total_tokens: float

    def __post_init__(self) -> None:
        least, most = FLOAT32
        if not least <= self.lr <= most:
            raise ValueError(f"lr must be above 0 and fit float32 ({least:g} to {most:g}), got {self.lr}")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must be 0 to lr ({self.lr:g}), got {self.min_lr}")
        if not 0 <= self.token_warmup < self.total_tokens:
            raise ValueError(
                f"token_warmup must be at least 0 and less than total_tokens ({self.total_tokens:g}), "
                f"got {self.token_warmup}"
            )

    @classmethod
    def of(cls, recipe: Recipe) -> LearningRate:
        return cls(recipe.lr, recipe.min_lr, recipe.token_warmup, recipe.total_tokens)

    def at(self, tokens: float) -> float:
        """The rate after ``tokens`` (millions); beyond ``total_tokens`` it stays at ``min_lr``."""
        if tokens < self.token_warmup:
            return self.lr * tokens / self.token_warmup
        progress = min(1.0, (tokens - self.token_warmup) / (self.total_tokens - self.token_warmup))
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1.0 + math.cos(math.pi * progress))


def learning_rate(tokens: float, recipe: Recipe) -> float:
    """The learning rate of a recipe after a number of counted tokens, in millions; see `LearningRate`."""
    return LearningRate.of(recipe).at(tokens)


def total_samples(recipe: Recipe) -> int:
    """Samples that make up ``total_tokens``.

    Raises:
        ValueError: a number is out of range; the message begins with its name.
    """
    if recipe.num_tokens_per_sample < 1:
        raise ValueError(f"num_tokens_per_sample must be above 0, got {recipe.num_tokens_per_sample}")
    if not ONE_TOKEN <= recipe.total_tokens <= MOST_TOKENS:
        raise ValueError(
            f"total_tokens must be above 0, {ONE_TOKEN:g} to {MOST_TOKENS:g} millions, got {recipe.total_tokens}"
        )
    return math.ceil(recipe.total_tokens * 1e6 / recipe.num_tokens_per_sample)
