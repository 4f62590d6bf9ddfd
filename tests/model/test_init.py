"""Initial values: nano4M's bit for bit, and what the Fourier ones are for."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from m4.data.tokenizers import code_levels
from m4.modalities import BINS, IMAGE_CODES, IMAGE_LEVELS, RowLayout
from m4.model import M4, ModelConfig
from m4.model.init import (
    COPYING,
    FREQUENCIES,
    OCTAVE_FALL,
    OFFSETS,
    OWN_DIRECTIONS,
    Looks,
    Space,
    bin_features,
    code_features,
)
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
    assert features.shape == (bins, 2 * FREQUENCIES + OWN_DIRECTIONS)
    torch.testing.assert_close(features.square().sum(1), torch.ones(bins, dtype=torch.float64), atol=1e-6, rtol=0)
    place = 2 / 3 if bins == 100 else 1.0
    v = 66 if bins == 100 else bins - 1
    # By hand: from half a period over the scale, so sin(π t) and cos(π t) of the bin's place t, up 10 octaves;
    # 10 of 13 parts are waves.
    sizes = [OCTAVE_FALL ** (10 * i / (FREQUENCIES - 1)) for i in range(FREQUENCIES)]
    total = math.sqrt(sum(size**2 for size in sizes) * 13 / 10)
    assert features[v, 0].item() == pytest.approx(math.sin(math.pi * place) / total, abs=1e-6)
    assert features[v, FREQUENCIES].item() == pytest.approx(math.cos(math.pi * place) / total, abs=1e-6)
    fastest = 2 * math.pi * 512 * place
    assert features[v, 2 * FREQUENCIES - 1].item() == pytest.approx(sizes[-1] * math.cos(fastest) / total, abs=1e-6)
    own = features[:, 2 * FREQUENCIES :]
    torch.testing.assert_close(own.square().sum(1), torch.full_like(own[:, 0], 3 / 13), atol=1e-6, rtol=0)
    if bins > 2:
        assert (own @ own.T).fill_diagonal_(0).mean().abs() < 0.01  # and each another


def test_bins_are_the_less_alike_the_further_off() -> None:
    wide = replace(RUN, dim=128)  # has a dimension for every feature
    weight = nn.functional.normalize(model(wide).enc_tok_emb.weight.detach())
    likeness = (weight[4000:4001] @ weight[2:BINS].T)[0, 4000 - 2 :]
    assert likeness[0] == pytest.approx(1.0, abs=1e-5)
    means = [likeness[low : 4 * low].mean().item() for low in (1, 4, 16, 64, 256, 1024)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.6
    assert likeness[1:].max() < 0.99  # each bin can be told from its neighbour
    assert likeness[1000:].max() < 0.6


def test_ids_of_visibility_are_not_neighbours() -> None:
    weight = nn.functional.normalize(model(RUN).enc_tok_emb.weight.detach())
    assert abs(float(weight[0] @ weight[1])) < 0.01


def test_features_of_codes_tell_digits_apart() -> None:
    features = code_features()
    assert features.shape == (IMAGE_CODES, sum(levels - 1 for levels in IMAGE_LEVELS))
    torch.testing.assert_close(features.square().sum(1), torch.ones(IMAGE_CODES))
    assert features.unique(dim=0).shape[0] == IMAGE_CODES
    one_digit = 2 + 8 * 3 + 64 * 4 + 512 * 1 + 2560 * 2 + 12800 * 1
    other, all_digits = one_digit + 8, one_digit + (1 + 8 + 64 + 512 + 2560 + 12800)
    assert features[one_digit] @ features[other] > 0.6
    assert features[one_digit] @ features[all_digits] < 0.3


def test_features_of_codes_by_the_digits_of_the_data() -> None:
    """fsq numbers its codes another way than Cosmos; a run's initial values follow its data."""
    levels = code_levels({"options": {"tokenizer": "fsq"}})
    assert levels != IMAGE_LEVELS
    features = code_features(levels)
    assert features.unique(dim=0).shape[0] == IMAGE_CODES
    slow = 25 * 3 + 5 * 2 + 2  # a step of the third digit
    assert features[slow] @ features[slow + 25] > features[slow] @ features[slow + 2 * 25]
    torch.testing.assert_close(code_features(), code_features(IMAGE_LEVELS))


def test_output_rows_are_the_embeddings_own() -> None:
    m = model(RUN)
    alike = nn.functional.cosine_similarity(m.to_logits.weight, m.enc_tok_emb.weight)
    torch.testing.assert_close(alike, torch.ones_like(alike))


@pytest.mark.parametrize("dim", [96, 128, 640])
def test_parts_of_the_space_are_at_right_angles(dim: int) -> None:
    m = model(replace(RUN, dim=dim, enc_depth=1, dec_depth=1))
    space = Space.of(m.pos_emb, RowLayout.of(m.config).described)
    bases = torch.cat([space.positions, space.kinds, space.own, space.channels, space.tokens])
    torch.testing.assert_close(bases @ bases.T, torch.eye(dim), atol=1e-5, rtol=0)
    outside = m.pos_emb - m.pos_emb @ space.positions.T @ space.positions
    assert outside.norm() < 0.004 * m.pos_emb.norm()
    # So tokens do not disturb the comparison of positions, nor positions what a token is.
    rows = m.enc_tok_emb.weight.detach()
    assert (rows @ Looks(space, 32).axes.T).abs().max() < 1e-4 * rows.norm(dim=1).max()
    assert (rows @ m.dec_mod_emb.weight.detach().T).abs().max() < 1e-3


@pytest.mark.parametrize(("dim", "head_dim"), [(96, 32), (128, 32), (256, 64), (640, 64)])
def test_attention_tells_a_position_from_its_neighbours(dim: int, head_dim: int) -> None:
    m = model(replace(RUN, dim=dim, head_dim=head_dim, enc_depth=1, dec_depth=1))
    looks = Looks(Space.of(m.pos_emb, RowLayout.of(m.config).described), head_dim)
    for embeddings in (m.pos_emb, nn.functional.layer_norm(m.pos_emb, (dim,))):  # norms take the mean away
        seen = embeddings @ looks.axes.T
        likeness = seen @ seen.T / seen.square().sum(1).mean()
        share = (COPYING[0] * likeness).softmax(1).diagonal()
        assert share.min() > 0.9
        assert share.mean() > 0.96


@pytest.mark.parametrize("offset", [0, *OFFSETS])
def test_a_head_looks_as_far_off_as_it_is_told(offset: int) -> None:
    """At a visible token of the position and kind, by the logits that it is given, through all norms."""
    m = model(replace(RUN, dim=128))
    space = Space.of(m.pos_emb, RowLayout.of(m.config).described)
    looks = Looks(space, 32)
    queries, keys = torch.zeros(128, 128), torch.zeros(128, 128)
    at, kind = 11.0, 5.0
    looks.set_head(2, queries, keys, (at, kind), (1.0, 1.0), offset)
    assert not queries[:64].any()
    assert not keys[96:].any()
    image, joints = space.modalities(RowLayout.of(m.config).described)[:2]
    here = m.pos_emb[40]
    there = m.pos_emb[40 + offset]

    def logit(query: torch.Tensor, key: torch.Tensor) -> float:
        return float((queries @ query)[64:96] @ (keys @ key)[64:96]) / math.sqrt(32)

    assert logit(here, there) == pytest.approx(at, rel=0.02)
    assert logit(here, m.pos_emb[40 + offset + 3]) < 0.8 * at
    assert logit(joints, joints) == pytest.approx(kind, rel=0.02)
    assert logit(joints, image) == pytest.approx(0, abs=1e-3)
    assert logit(joints + here, joints + there) == pytest.approx(at + kind, rel=0.02)


@pytest.mark.parametrize(("dim", "head_dim"), [(8, 4), (16, 16), (24, 2), (32, 8)])
def test_models_too_small_for_all_that_start_all_the_same(dim: int, head_dim: int) -> None:
    m = model(replace(RUN, dim=dim, head_dim=head_dim))
    assert all(parameter.isfinite().all() for parameter in m.parameters())


@pytest.mark.parametrize(("dim", "head_dim", "depth"), [(96, 32, 2), (160, 32, 4), (128, 64, 1)])
def test_an_untrained_model_copies_what_it_sees_at_the_target_s_place(dim: int, head_dim: int, depth: int) -> None:
    """Of its own kind: x of the reference pose for x of the next pose, though image codes stand at the same places."""
    m = model(replace(RUN, dim=dim, head_dim=head_dim, dec_depth=depth))
    g = torch.Generator().manual_seed(0)
    samples = 6
    images = torch.randint(BINS, IMAGE_CODES, (samples, 256), generator=g)
    poses = torch.randint(VISIBLE_FROM, BINS, (samples, 39), generator=g)
    poses[:, 26:] = torch.randint(2, (samples, 13), generator=g)
    ids = torch.cat([images, poses], dim=1).reshape(-1)
    positions = torch.cat([torch.arange(256), torch.arange(39)]).repeat(samples)

    def packed(image: int, joints: int) -> PackedTokens:
        counts = torch.zeros(samples, 4, dtype=torch.long)
        counts[:, image], counts[:, joints] = 256, 39
        modality = torch.tensor([image] * 256 + [joints] * 39).repeat(samples)
        return PackedTokens(ids, positions, modality, Segments.from_counts(counts))

    with torch.no_grad():
        logits = m.logits(MaskedBatch(packed(0, 1), packed(2, 3)))
    copied = (logits.argmax(1) == ids).view(samples, -1)
    assert copied.float().mean() > 0.99
    assert copied.float().mean(0).min() > 0.6  # at every place
    # Where it copies another, it is near.
    error = (logits.argmax(1) - ids).abs().view(samples, -1)[:, 256:282] / 32  # pixels
    assert error.median() == 0


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
