"""Ids out of decoder outputs: the distribution is the stated one, in whatever pieces it is computed."""

import itertools

import pytest
import torch

from m4.generation import sampling
from m4.generation.decode import generate
from m4.generation.noise import uniforms
from m4.generation.options import ORDERS, Decoding
from m4.generation.sampling import Rule, choose
from m4.generation.schedules import SCHEDULES, temperatures, tokens_kept
from m4.model import M4, ModelConfig

IDS, DRAWS = 23, 2000


@pytest.fixture(params=[(256, 2048), (7, 4)], ids=["whole", "in pieces"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(sampling, "_BLOCKS", {"cpu": request.param})
    monkeypatch.setattr(sampling, "_RANKED_BYTES", 4 * IDS * request.param[0])


def drawn(rule, limit=IDS, ordinal=False):
    """What is drawn at evenly spread places of the distribution, sure how; and the true distribution, float64."""
    generator = torch.Generator().manual_seed(3)
    y, weight = torch.randn(1, 8, generator=generator), torch.randn(IDS, 8, generator=generator)
    at = (torch.arange(DRAWS) + 0.5).double() / DRAWS
    limits, scale = torch.full((DRAWS,), limit), torch.full((DRAWS,), ordinal)
    ids, log_p, _ = choose(y.expand(DRAWS, -1), weight, limits, scale, rule, at if rule.temperature else None)
    return ids, log_p, (y.double() @ weight.double().T)[0, :limit]


@pytest.mark.parametrize("ids", [1, 2, 63, 64, 65, 130, 512, 1000, 2048])
def test_the_largest_is_found_as_pytorch_finds_it(ids):
    """The first of equals, and of places that are not a number."""
    logits = torch.randn(300, ids, generator=torch.Generator().manual_seed(ids)).mul(2).round()
    logits[0], logits[1], logits[2, ids // 2] = -torch.inf, torch.nan, torch.nan
    logits[3, -1] = 99.0
    found, expected = sampling._highest(logits), logits.max(-1)
    torch.testing.assert_close(found[0], expected.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], expected.indices)


def shares(ids, limit=IDS):
    return torch.bincount(ids, minlength=limit).double() / DRAWS


@pytest.mark.parametrize("limit", [IDS, 9, 2, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0, 1e-30, 1e6])
def test_draws_follow_the_distribution(blocks, limit, temperature):
    ids, log_p, logits = drawn(Rule(temperature), limit)
    expected = (logits / max(temperature, 1e-6)).softmax(-1)
    assert shares(ids, limit).sub(expected).abs().max() < 1.5 / DRAWS  # evenly spread places miss by at most one
    assert log_p == pytest.approx(logits.log_softmax(-1)[ids], abs=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (None, 0.6), (4, 0.5), (1, 1.0), (None, 0.0), (99, 1.0)])
def test_draws_among_the_likeliest(blocks, top_k, top_p):
    ids, log_p, logits = drawn(Rule(0.8, top_k, top_p))
    p = (logits / 0.8).softmax(-1)
    ranked = p.argsort(descending=True)[: top_k or IDS]
    p_ranked = p[ranked] / p[ranked].sum()
    left = ranked[p_ranked.cumsum(0) - p_ranked < max(top_p, 1e-9)]
    expected = torch.zeros_like(p).scatter(0, left, p[left] / p[left].sum())
    assert shares(ids).sub(expected).abs().max() < 1.5 / DRAWS
    assert log_p == pytest.approx(logits.log_softmax(-1)[ids], abs=1e-5)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99, 1 - 1e-9])
def test_few_ids_are_ranked_at_first_and_all_where_they_are_needed(monkeypatch, top_p):
    """Rows from nearly sure to nearly even get the same ids, whatever is ranked first and whatever is beside them."""
    g = torch.Generator().manual_seed(5)
    y, weight = torch.randn(40, 6, generator=g) * torch.logspace(-2, 1, 40)[:, None], torch.randn(500, 6, generator=g)
    at, limits = torch.rand(40, generator=g, dtype=torch.float64), torch.full((40,), 500)
    found = []
    for counts in ((), (3,), (2, 50)):
        monkeypatch.setattr(sampling, "_RANKED", counts)
        found.append(choose(y, weight, limits, limits < 0, Rule(1.0, top_p=top_p), at).ids)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    few = choose(y[:7], weight, limits[:7], limits[:7] < 0, Rule(1.0, top_p=top_p), at[:7]).ids
    assert torch.equal(few, found[0][:7])


@pytest.mark.parametrize("limit", [IDS, 5, 1])
def test_temperature_0(blocks, limit):
    ids, log_p, logits = drawn(Rule(), limit)
    assert (ids == logits.argmax()).all()
    assert log_p == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-5)
    medians, sure, _ = drawn(Rule(), limit, ordinal=True)
    assert (medians == int((logits.softmax(-1).cumsum(0) <= 0.5).sum())).all()
    assert torch.equal(sure, log_p)


def test_the_ends_of_a_distribution():
    """An id without probability is never drawn, neither for 0 nor for what is nearly 1."""
    weight = torch.tensor([[-1e4], [0.0], [-1e4], [0.0], [-1e4]])
    at = torch.tensor([0.0, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    for rule in (Rule(1.0), Rule(1.0, top_k=5), Rule(1.0, top_p=1 - 1e-9)):
        ids, *_ = choose(torch.ones(4, 1), weight, torch.full((4,), 5), torch.zeros(4, dtype=torch.bool), rule, at)
        assert set(ids.tolist()) == {1, 3}


def test_uniforms_are_even_and_a_function_of_what_they_are_for():
    ids, places = torch.arange(50) + 2**40, torch.arange(200).expand(50, -1)
    first, second = uniforms(2**63 + 5, ids, places, step=3)
    for draw in (first, second):
        assert draw.min() >= 0
        assert draw.max() < 1
        assert draw.flatten().sort().values.sub(torch.linspace(0, 1, draw.numel())).abs().max() < 0.02
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.05
    again, _ = uniforms(2**63 + 5, ids[7:9], places[7:9, 3:5], step=3)
    assert torch.equal(again, first[7:9, 3:5])
    for other in ({"step": 4}, {"step": 3, "moment": 1}):
        assert not torch.equal(uniforms(2**63 + 5, ids, places, **other)[0], first)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_keeps_something(schedule):
    for total, steps in itertools.product((1, 2, 12, 39, 295), (1, 2, 3, 11, 39, 295)):
        if steps > total:
            with pytest.raises(ValueError, match=f"^steps: expected 1 … {total}, .* got {steps}"):
                tokens_kept(total, steps, schedule)
            continue
        kept = tokens_kept(total, steps, schedule)
        assert (len(kept), sum(kept)) == (steps, total)
        assert min(kept) >= 1
    assert (
        tokens_kept(100, 4, schedule)
        == {
            "constant": [25, 25, 25, 25],
            "linear": [7, 18, 32, 43],  # 100 t² rounded up
            "cosine": [8, 22, 32, 38],  # 100 (1 - cos(π t / 2)) rounded up
        }[schedule]
    )
    heat = temperatures(2.0, 4, schedule)
    assert heat == pytest.approx(
        {
            "constant": [2, 2, 2, 2],
            "linear": [2, 1.5, 1, 0.5],
            "cosine": [2, 1.8478, 1.4142, 0.7654],
        }[schedule],
        abs=1e-4,
    )


EXTREMES = {
    "temperature": (0.0, 10.0),
    "top_p": (0.0, 1.0),
    "top_k": (None, 1),
    "steps": (1, 8),  # at once, and one token a step
    "guidance": (1.0, 10.0),
    "order": ORDERS,
}


def test_ten_thousand_draws_with_extreme_settings():
    """Never an id that the tokenizer cannot decode, nor a change of what is given."""
    config = ModelConfig(
        modalities=["a", "b", "c"], vocab_sizes=[40, 30, 40], max_seq_lens=[3, 4, 4], dim=8, head_dim=8,
        enc_depth=1, dec_depth=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = M4(config).eval()
    with torch.no_grad():
        model.to_logits.weight.normal_(std=5)
    limits = torch.tensor([40, 40, 40, 30, 7, 2, 1, 40, 33, 17, 5])
    draws = 0
    for number, values in enumerate(itertools.product(*EXTREMES.values())):
        decoding = Decoding(**dict(zip(EXTREMES, values, strict=True)), seed=number, schedule=SCHEDULES[number % 3])
        tokens = torch.randint(0, 40, (160, 11), generator=torch.Generator().manual_seed(number))
        ordinal = torch.arange(11) == 3
        out = generate(
            model, tokens, given=["a"], wanted=["b", "c"], id_limits=limits, ordinal=ordinal, decoding=decoding
        )
        assert torch.equal(out[:, :3], tokens[:, :3])
        assert ((out[:, 3:] >= 0) & (out[:, 3:] < limits[3:])).all(), decoding
        draws += len(out)
    assert draws >= 10_000
