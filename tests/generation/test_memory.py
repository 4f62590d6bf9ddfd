"""Memory of generation: bounded by what is decoded at once, whatever the number of samples; logits are never whole."""

import pytest
import torch

from m4.generation import decode, sampling
from m4.generation.decode import generate
from m4.generation.options import Decoding
from m4.model import M4, ModelConfig
from m4kernels.testing import peak_extra_memory

IDS, TOKENS = 4096, 16


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "order": "random"}, {"temperature": 1.0, "top_p": 0.5}])
def test_peak_does_not_grow_with_the_samples(monkeypatch, settings):
    config = ModelConfig(["given", "wanted"], [IDS, IDS], [4, TOKENS], dim=8, head_dim=8, enc_depth=1, dec_depth=1)
    torch.manual_seed(0)
    model = M4(config).eval()
    monkeypatch.setattr(decode, "_ACTIVATION_BYTES", 1 << 18)  # some ten samples at once
    monkeypatch.setattr(sampling, "_BLOCKS", {"cpu": (64, 512)})
    monkeypatch.setattr(sampling, "_RANKED_BYTES", 1 << 18)
    decoding = Decoding(steps=2, **settings)
    limits, ordinal = torch.full((4 + TOKENS,), IDS), torch.arange(4 + TOKENS) % 2 > 0

    def peak(samples):
        tokens = torch.zeros(samples, 4 + TOKENS, dtype=torch.int64)
        kinds = {"given": ["given"], "wanted": ["wanted"], "id_limits": limits, "ordinal": ordinal}
        return peak_extra_memory(lambda: generate(model, tokens, decoding=decoding, **kinds))

    few, many = peak(20), peak(80)
    results = 8 * (4 + TOKENS) * 80  # int64, while they are joined held twice
    assert many < few + 2 * results + 2**18
    assert many < 80 * TOKENS * IDS * 4 / 4  # whole logits are 21 MB
