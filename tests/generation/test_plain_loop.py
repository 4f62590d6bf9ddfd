"""What is fast fills in what the plain loop does."""

import torch

from benchmarks.bench_generation import inputs, plain
from m4.generation.decode import generate
from m4.generation.options import Decoding
from m4.modalities import NEXT, REFERENCE


def test_the_plain_loop_fills_in_the_same():
    for encoder in ("full", "within_modality"):
        given = inputs(2, 32, 1, encoder)
        options = {"id_limits": given.limits, "ordinal": given.ordinal, "decoding": Decoding()}
        filled = generate(given.model, given.tokens, given=REFERENCE, wanted=NEXT, **options)
        expected = plain(2)(given)()
        assert (filled == expected).float().mean() > 0.99  # tokens that are as likely as others to the last bit aside
        assert torch.equal(filled[:, :295], given.tokens[:, :295])
