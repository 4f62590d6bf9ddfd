"""Image codes of least expected error: against a search over all codes, in float64, and against decoded pictures."""

import numpy as np
import pytest
import torch

from m4.data.tokenizers import code_values, make_tokenizer
from m4.generation import estimates
from m4.generation.decode import generate, predict_at_once
from m4.generation.estimates import CodeValues
from m4.generation.options import Decoding
from m4.generation.sampling import Rule, choose
from m4.modalities import RowLayout
from m4.model import M4, ModelConfig

FSQ = {"options": {"tokenizer": "fsq"}}


def random_values(v, c, seed=0):
    return torch.randn(v, c, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("t", "n", "v", "c"), [(7, 40, 40, 5), (3, 11, 40, 2), (1, 1, 1, 1), (0, 5, 5, 3)])
def test_closest_has_the_least_expected_squared_distance(t, n, v, c):
    values = random_values(v, c)
    p = torch.rand(t, n, generator=torch.Generator().manual_seed(1)).softmax(-1)
    chosen = CodeValues(torch.zeros(0), values).closest(p @ values[:n], n)
    squared = (values[:n, None].double() - values[None, :n].double()).square().sum(-1)  # (candidate, true)
    expected = p.double() @ squared.T  # (T, candidate)
    assert chosen.shape == (t,)
    assert chosen.dtype == torch.int64
    for row, code in zip(expected, chosen.tolist(), strict=True):
        assert row[code] <= row.min() * (1 + 1e-5) + 1e-6


def test_points_that_are_not_finite_do_not_stop_what_says_so():
    """A model whose outputs are not finite is refused by its probabilities, with an error that says what to do."""
    points = torch.full((2, 3), float("nan"))
    points[1] = float("inf")
    chosen = CodeValues(torch.zeros(0), random_values(30, 3)).closest(points, 20)
    assert bool((chosen < 20).all())


def test_places_share_what_was_made_for_the_search():
    values = CodeValues(torch.tensor([True, False]), random_values(30, 3))
    some = values.at(torch.tensor([1, 0, 0]))
    assert some.where.tolist() == [False, True, True]
    points = random_values(50, 3, seed=2)
    few, many = (some.closest(points, codes) for codes in (7, 30))
    assert bool((few < 7).all())
    assert bool((many >= 7).any())
    assert torch.equal(values.closest(points, 7), few)


def test_a_sure_distribution_keeps_its_code():
    values = torch.from_numpy(code_values(FSQ))
    codes = torch.tensor([0, 31_999, 63_999, 777])
    assert torch.equal(CodeValues(torch.zeros(0), values).closest(values[codes], 64_000), codes)


def test_distance_of_values_is_that_of_decoded_blocks():
    """Of plain grids, whose blocks blend with their like: of two codes without slopes exactly, but for rounding."""
    tokenizer, values = make_tokenizer("fsq"), code_values(FSQ)
    assert values.shape == (64_000, 5)
    assert values.dtype == np.float32
    colours = values[:, :3]
    plain = np.flatnonzero((np.abs(values[:, 3:]).sum(1) == 0) & (colours > 1).all(1) & (colours < 254).all(1))
    codes = np.random.default_rng(0).choice(plain, 12)
    decoded = tokenizer.decode(np.broadcast_to(codes[:, None, None], (12, 16, 16))).astype(float)
    for i in range(11):
        error = np.square(decoded[i] - decoded[i + 1]).mean((0, 1)).sum()
        distance = np.square(values[codes[i]] - values[codes[i + 1]]).sum()
        assert error**0.5 == pytest.approx(distance**0.5, abs=np.sqrt(3) + 1e-3)  # both rounded to a grey level


def test_of_a_block_alone_a_slope_counts_beside_a_colour_as_it_does_in_the_picture():
    tokenizer, values = make_tokenizer("fsq"), code_values(FSQ)
    grey = np.flatnonzero((values[:, :3].max(1) - values[:, :3].min(1) < 1e-3) & (np.abs(values[:, 0] - 128) < 30))
    plain = grey[np.abs(values[grey, 3:]).sum(1) == 0]
    middle, brighter = plain[np.abs(values[plain, 0] - 128).argmin()], plain[values[plain, 0].argmax()]
    same = grey[values[grey, 0] == values[middle, 0]]
    across, down = (same[values[same, axis].argmax()] for axis in (3, 4))
    grids = np.full((4, 16, 16), middle)
    grids[1:, 8, 8] = brighter, across, down
    decoded = tokenizer.decode(grids).astype(float)
    error = np.square(decoded[1:] - decoded[0]).sum((1, 2, 3))
    distance = np.square(values[[brighter, across, down]] - values[middle]).sum(1)
    np.testing.assert_allclose(error / error[0], distance / distance[0], rtol=0.1)  # grey levels are rounded


def test_of_what_data_says():
    layout = RowLayout(("tok_rgb", "coords"), (256, 39), (64_000, 8192))
    assert CodeValues.of(layout, {}, torch.device("cpu")) is None
    assert CodeValues.of(layout, {"options": {"tokenizer": "cosmos"}}, torch.device("cpu")) is None
    found = CodeValues.of(layout, FSQ, torch.device("cpu"))
    assert found is not None
    assert found.where.tolist() == [True] * 256 + [False] * 39


@pytest.fixture
def model():
    torch.manual_seed(0)
    names = ["tok_rgb", "coords", "tok_rgb_next", "coords_next"]
    sizes = {"vocab_sizes": [32, 20, 32, 20], "max_seq_lens": [5, 3, 5, 3]}
    model = M4(ModelConfig(modalities=names, **sizes, dim=16, head_dim=8, enc_depth=1, dec_depth=1)).eval()
    with torch.no_grad():
        model.to_logits.weight.normal_()
    return model


def test_decoding_shows_the_closest_code_and_tells_the_likeliest(model):
    tokens = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    where = torch.zeros(16, dtype=torch.bool)
    where[8:13] = True
    values = CodeValues(where, random_values(32, 2))
    names = {"given": ["tok_rgb", "coords"], "wanted": ["tok_rgb_next", "coords_next"]}
    plain = predict_at_once(model, tokens, **names)
    assert torch.equal(plain.tokens, plain.shown)
    both = predict_at_once(model, tokens, **names, code_values=values)
    assert torch.equal(both.tokens, plain.tokens)
    assert torch.equal(both.shown[:, 13:], plain.shown[:, 13:])
    assert not torch.equal(both.shown, both.tokens)
    once = Decoding(steps=1)
    assert torch.equal(generate(model, tokens, **names, code_values=values, decoding=once), both.shown)
    sampled = Decoding(temperature=1.0, seed=3, steps=2)  # of draws nothing is expected
    drawn = generate(model, tokens, **names, decoding=sampled)
    assert torch.equal(generate(model, tokens, **names, decoding=sampled, code_values=values), drawn)


@pytest.mark.parametrize("limit", [1, 17, 5000])
def test_the_expected_point_of_many_ids(limit):
    """More ids than are held at once, against float64; below a limit, and beside rows that are no codes."""
    generator = torch.Generator().manual_seed(limit)
    y, weight = torch.randn(9, 6, generator=generator) * 2, torch.randn(5000, 6, generator=generator)
    values, where = torch.randn(5000, 4, generator=generator), torch.arange(9) % 3 > 0
    limits, ordinal = torch.full((9,), limit), torch.zeros(9, dtype=torch.bool)
    found = choose(y, weight, limits, ordinal, Rule(), code_values=CodeValues(where, values))
    logits = y.double() @ weight[:limit].double().T
    p, sharp = logits.softmax(-1), (estimates.SHARPNESS * logits).softmax(-1)
    squared = torch.cdist(sharp @ values[:limit].double(), values[:limit].double()).square()
    taken = squared.gather(1, found.shown[:, None])[:, 0]
    assert bool((taken <= squared.min(1).values + 1e-5)[where].all())
    assert torch.equal(found.shown[~where], found.ids[~where])
    assert torch.equal(found.ids, p.argmax(-1))
