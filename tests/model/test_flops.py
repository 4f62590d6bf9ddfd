"""What a step computes, against torch's own count of the products in a forward and backward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from m4.model import M4, ModelConfig
from m4.model.flops import training_flop
from m4kernels import MaskedBatch, Segments
from m4kernels.cases import random_packed

SIZES = {"dim": 32, "head_dim": 8, "enc_depth": 3, "dec_depth": 2, "mlp_ratio": 3}


def _batch(vocabulary):
    g = torch.Generator().manual_seed(0)
    halves = (torch.tensor([[5, 0], [2, 3]]), torch.tensor([[4, 1], [0, 6]]))
    return MaskedBatch(*(random_packed(Segments.from_counts(c.int(), max_seqlen=16), vocabulary, g) for c in halves))


@pytest.mark.parametrize("recompute", [False, True])
def test_linear_layers_are_all_counted(recompute):
    """Blocks that are computed again count once; a product counts 2 forward, 4 backward."""
    vocabulary = (40, 24)
    model = M4(ModelConfig(["a", "b"], list(vocabulary), [16, 16], activation_checkpointing=recompute, **SIZES))
    batch = _batch(vocabulary)
    with FlopCounterMode(display=False) as counter:
        y = model.decode(batch)
    inputs, targets = len(batch.encoder.ids), batch.decoder.segments.counts.sum(0).tolist()
    layers = training_flop(model.config, inputs, targets) - 6 * SIZES["dim"] * (4 * 40 + 7 * 24)  # the output layer
    products = {name: flop for name, flop in counter.get_flop_counts()["Global"].items() if "mm" in str(name)}
    assert 3 * sum(products.values()) == layers
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    if not recompute:
        assert sum(f for n, f in counter.get_flop_counts()["Global"].items() if "mm" in str(n)) == layers * 2 / 3
