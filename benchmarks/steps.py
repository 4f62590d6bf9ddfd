"""Training steps as benchmarks take them: of the trainer itself, on random tokens, with any of the model's kernels."""

from dataclasses import replace

import numpy as np

from m4.build import Stores
from m4.config import TrainConfig
from m4.data.store import TokenStore
from m4.training.adamw import AdamW
from m4.training.optimizer import MuonAndAdamW
from m4.training.trainer import Trainer

ROWS = 64  # of random tokens


def random_stores(config: TrainConfig) -> Stores:
    """Tokens that every modality allows; two rows for evaluation."""
    chance = np.random.default_rng(0)
    spans = zip(config.vocab_sizes, config.max_seq_lens, strict=True)
    rows = np.concatenate([chance.integers(0, size, (ROWS, length)) for size, length in spans], axis=1)
    tokens = rows.astype(np.uint16)
    names = tuple(str(row) for row in range(ROWS))
    return Stores(TokenStore(tokens, "random", names), TokenStore(tokens[:2], "random", names[:2]))


def bare_step(trainer: Trainer) -> None:
    """The step at hand, of which nothing is looked at."""
    inputs = trainer.batches.step(trainer.state.position)
    trainer.step.start(inputs.counts, trainer.config.lr)
    for batch in inputs.micro_batches:
        trainer.step.micro_batch(batch.masked)
    trainer.step.update()
    if trainer.execution.asynchronous:
        trainer.step.read()  # waits for the device
    trainer.step.release()


def use_kernels(trainer: Trainer, kernels: str, dtype: str = "fp32") -> None:
    """From here on the trainer's steps are those of such ``kernels`` and such a ``dtype``."""
    trainer.model.config = replace(trainer.model.config, kernels=kernels)
    trainer.step._config = replace(trainer.step._config, dtype=dtype)
    optimizer = trainer.optimizer
    adamw = optimizer.adamw if isinstance(optimizer, MuonAndAdamW) else optimizer
    assert isinstance(adamw, AdamW)
    adamw.in_one_pass = kernels == "auto"
