"""Initial values: nano4M's bit for bit, and what the Fourier ones are for."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from m4.modalities import BINS, IMAGE_CODES, IMAGE_LEVELS
from m4.model import M4, ModelConfig
from m4.model.init import FREQUENCIES, HEAD_SCALE, bin_features, code_features
from m4kernels import MaskedBatch, PackedTokens, Segments

RUN = ModelConfig(
    ("tok_rgb", "coords", "tok_rgb_next", "coords_next"),
    (IMAGE_CODES, BINS, IMAGE_CODES, BINS),
    (256, 39, 256, 39),
    dim=96,
    enc_depth=2,
    dec_depth=2,
    head_dim=32,
)


VISIBLE_FROM = 2  # ids 0 and 1 are visibility's


def model(config: ModelConfig, seed: int = 0) -> M4:
    torch.manual_seed(seed)
    return M4(config)


def test_normal_values_are_those_of_nano4m_bit_for_bit() -> None:
    """In the order of the modules: N(0, 0.02²), then biases and the output layer 0."""
    torch.manual_seed(3)
    expected = {}
    for name, module in M4(replace(RUN, init="normal")).named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            expected[name] = module.weight.shape
    torch.manual_seed(3)
    # What constructing draws before: the default values of every layer.
    M4.init_weights, kept = (lambda self: None), M4.init_weights
    try:
        M4(replace(RUN, init="normal"))
    finally:
        M4.init_weights = kept  # type: ignore[method-assign]
    drawn = {name: torch.empty(shape).normal_(std=0.02) for name, shape in expected.items()}
    got = dict(model(replace(RUN, init="normal"), 3).named_modules())
    for name, values in drawn.items():
        weight = got[name].weight  # type: ignore[union-attr]
        assert torch.equal(weight, torch.zeros_like(weight) if name == "to_logits" else values), name
    assert not got["dec_context_proj"].bias.any()  # type: ignore[union-attr]


def test_names_shapes_and_types_do_not_depend_on_the_initial_values() -> None:
    fourier, normal = (model(replace(RUN, init=init)).state_dict() for init in ("fourier", "normal"))
    assert {k: (v.shape, v.dtype) for k, v in fourier.items()} == {k: (v.shape, v.dtype) for k, v in normal.items()}


def test_the_same_seed_gives_the_same_values() -> None:
    first, again, other = (model(RUN, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["enc_tok_emb.weight"], other["enc_tok_emb.weight"])


@pytest.mark.parametrize("bins", [2, 100, BINS])
def test_features_of_bins(bins: int) -> None:
    features = bin_features(bins).double()
    assert features.shape == (bins, 1 + 2 * FREQUENCIES)
    torch.testing.assert_close(features.square().sum(1), torch.ones(bins, dtype=torch.float64))
    place = 2 / 3 if bins == 100 else 1.0
    v = 66 if bins == 100 else bins - 1
    # The slowest wave by hand: half a period over the scale, so sin(π t) and cos(π t) of the bin's place t.
    scale = 1 / math.sqrt(1 + FREQUENCIES)
    assert features[v, 1].item() == pytest.approx(scale * math.sin(math.pi * place), abs=1e-6)
    assert features[v, 1 + FREQUENCIES].item() == pytest.approx(scale * math.cos(math.pi * place), abs=1e-6)


def test_near_bins_are_alike_and_far_ones_are_not() -> None:
    weight = nn.functional.normalize(model(RUN).enc_tok_emb.weight.detach())
    likeness = weight[4000:4001] @ weight[2:BINS].T
    likeness = likeness[0, 4000 - 2 :]
    assert likeness[0] == pytest.approx(1.0, abs=1e-5)
    assert likeness[8] > 0.98  # a quarter of a pixel
    assert likeness[8] > likeness[32] > likeness[96] > likeness[400]
    assert likeness[1000:].max() < 0.75


def test_ids_of_visibility_are_not_neighbours() -> None:
    weight = nn.functional.normalize(model(RUN).enc_tok_emb.weight.detach())
    assert abs(float(weight[0] @ weight[1])) < 0.5


def test_features_of_codes_tell_digits_apart() -> None:
    features = code_features()
    assert features.shape == (IMAGE_CODES, 1 + sum(levels - 1 for levels in IMAGE_LEVELS))
    torch.testing.assert_close(features.square().sum(1), torch.ones(IMAGE_CODES))
    assert features.unique(dim=0).shape[0] == IMAGE_CODES
    one_digit = 2 + 8 * 3 + 64 * 4 + 512 * 1 + 2560 * 2 + 12800 * 1
    other, all_digits = one_digit + 8, one_digit + (1 + 8 + 64 + 512 + 2560 + 12800)
    assert features[one_digit] @ features[other] > 0.6
    assert features[one_digit] @ features[all_digits] < 0.3


def test_output_rows_are_the_embeddings_own() -> None:
    m = model(RUN)
    torch.testing.assert_close(m.to_logits.weight[:BINS], HEAD_SCALE * m.enc_tok_emb.weight[:BINS])
    alike = nn.functional.cosine_similarity(m.to_logits.weight[BINS:], m.enc_tok_emb.weight[BINS:])
    torch.testing.assert_close(alike, torch.ones_like(alike))


@pytest.mark.parametrize(("dim", "head_dim", "depth"), [(96, 32, 2), (160, 32, 4)])
def test_an_untrained_model_predicts_what_it_sees_at_the_target_s_place(dim: int, head_dim: int, depth: int) -> None:
    """Of the modality itself at that: x of the reference pose for x of the next pose."""
    m = model(replace(RUN, dim=dim, head_dim=head_dim, dec_depth=depth))
    g = torch.Generator().manual_seed(0)
    samples = 40
    pose = torch.randint(VISIBLE_FROM, BINS, (samples, 26), generator=g)
    positions = torch.arange(26).repeat(samples)

    def packed(modality: int) -> PackedTokens:
        counts = torch.zeros(samples, 4, dtype=torch.long)
        counts[:, modality] = 26
        return PackedTokens(
            pose.reshape(-1), positions, torch.full_like(positions, modality), Segments.from_counts(counts)
        )

    with torch.no_grad():
        logits = m.logits(MaskedBatch(packed(1), packed(3)))
    error = (logits.argmax(1) - pose.reshape(-1)).abs().float() / 32  # pixels
    chance = (pose.reshape(-1) - pose.reshape(-1)[torch.randperm(len(error), generator=g)]).abs().float() / 32
    assert error.median() < chance.median() / 3


def test_other_vocabularies() -> None:
    """Fewer bins are a coarser scale; other codes, and modalities of which nothing is known, stay normal."""
    m = model(replace(RUN, vocab_sizes=(500, 100, 500, 100)))
    weight = m.enc_tok_emb.weight.detach()
    assert weight[2:100].std() == pytest.approx(1.0, rel=0.3)
    assert weight[100:].std() == pytest.approx(0.02, rel=0.1)
    assert not m.to_logits.weight[100:].any()
    plain = model(replace(RUN, modalities=("a", "b", "c", "d"))).enc_tok_emb.weight.detach()
    assert plain.std() == pytest.approx(0.02, rel=0.1)


def test_unknown_initial_values() -> None:
    with pytest.raises(ValueError, match="init must be one of fourier, normal, got 'zeros'"):
        replace(RUN, init="zeros")
