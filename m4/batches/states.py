"""What the masking rule makes of the tokens of a sample."""

from __future__ import annotations

import numpy as np
import torch

from m4.config import TrainConfig
from m4kernels import mask_tokens

UNUSED, INPUT, TARGET = range(3)


def mask_states(config: TrainConfig, samples: int, epoch: int = 0) -> np.ndarray:
    """uint8 (samples, L): UNUSED, INPUT or TARGET for every token of the first samples in training."""
    spec = config.masking_spec()
    tokens = torch.zeros(1, dtype=torch.uint16).expand(samples, spec.num_tokens)  # what they are is no matter
    ids = torch.arange(samples)
    batch = mask_tokens(tokens, spec, seed=config.seed, sample_ids=ids, epoch=epoch, backend="reference")
    states = np.zeros((samples, spec.num_tokens), dtype=np.uint8)
    starts = np.concatenate([[0], np.cumsum(spec.max_seq_lens)[:-1]])
    for state, half in ((INPUT, batch.encoder), (TARGET, batch.decoder)):
        places = starts[half.modalities.numpy()] + half.positions.numpy()
        states[half.segments.sample_of_token(len(places)).numpy(), places] = state
    return states
