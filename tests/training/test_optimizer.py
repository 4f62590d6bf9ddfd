"""Decay groups and the learning rate over counted tokens."""

import copy
import math

import pytest
import torch

from m4.build import build_model
from m4.config import ModelSection, TrainConfig
from m4.schedule import learning_rate
from m4.training.adamw import BETAS, EPS, AdamW, clip_factor
from m4.training.optimizer import build_optimizer, keep_rates_on, load_optimizer_state, set_learning_rate


@pytest.fixture
def recipe():
    return TrainConfig()


def test_learning_rate_corners(recipe):
    assert learning_rate(0, recipe) == 0
    assert learning_rate(250, recipe) == pytest.approx(0.001)
    assert learning_rate(500, recipe) == pytest.approx(0.002)
    assert learning_rate(1750, recipe) == pytest.approx((0.002 + 1e-7) / 2)
    assert learning_rate(3000, recipe) == pytest.approx(1e-7)
    assert learning_rate(3001, recipe) == pytest.approx(1e-7)


def test_learning_rate_against_the_formula(recipe):
    for tokens in range(500, 3000, 7):
        expected = 1e-7 + (0.002 - 1e-7) * (1 + math.cos(math.pi * (tokens - 500) / 2500)) / 2
        assert learning_rate(tokens, recipe) == pytest.approx(expected, rel=1e-12)


def test_no_warm_up(recipe):
    recipe.token_warmup = 0.0
    assert learning_rate(0, recipe) == recipe.lr


def test_only_weights_and_embeddings_decay(recipe):
    model = torch.nn.ModuleDict(
        {"emb": torch.nn.Embedding(5, 4), "norm": torch.nn.LayerNorm(4, bias=False), "proj": torch.nn.Linear(4, 4)}
    )
    optimizer = build_optimizer(model, recipe)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert by_name == {"emb.weight": 0.05, "norm.weight": 0.0, "proj.weight": 0.05, "proj.bias": 0.0}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 0.002)


def test_rows_of_the_vocabulary_learn_at_a_rate_of_their_own():
    recipe = TrainConfig(
        vocab_sizes=[50] * 4,
        vocab_lr_scale=0.25,
        model=ModelSection(dim=32, enc_depth=1, dec_depth=1, head_dim=16),
    )
    model = build_model(recipe, torch.device("cpu"))
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, 0.008)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rows = name in ("enc_tok_emb.weight", "to_logits.weight")
        assert rates[id(parameter)] == (0.002 if rows else 0.008), name
        assert decays[id(parameter)] == (0.05 if parameter.ndim >= 2 else 0.0), name


def test_checkpoints_of_before_still_have_the_groups_of_a_common_rate():
    """Two, as those without `vocab_lr_scale` had."""
    recipe = TrainConfig(vocab_sizes=[50] * 4, model=ModelSection(dim=32, enc_depth=1, dec_depth=1, head_dim=16))
    assert len(build_optimizer(build_model(recipe, torch.device("cpu")), recipe).param_groups) == 2


def _small(**changes):
    model = ModelSection(dim=32, enc_depth=1, dec_depth=1, head_dim=16)
    return TrainConfig(**{"vocab_sizes": [50] * 4, "vocab_lr_scale": 0.25, "model": model, **changes})


def _give_gradients(model, step):
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def _update(model, optimizer, step, most):
    """Clip and step as `TrainStep` does."""
    _give_gradients(model, step)
    optimizer.found_inf = torch.zeros(())
    optimizer.grad_factor = clip_factor(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]), most)
    set_learning_rate(optimizer, 0.01 / (step + 1))
    optimizer.step()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("most", [1.0, 1e9, None])
def test_a_step_is_torchs_clipping_and_adamw(kernels, most):
    """By group; also from the state of the other, which has the same keys, shapes and dtypes."""
    recipe = _small(kernels=kernels)
    models = [build_model(recipe, torch.device("cpu")) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = build_optimizer(models[0], recipe)
    assert ours.in_one_pass == (kernels == "auto")
    groups = build_optimizer(models[1], recipe).param_groups
    settings = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    theirs = torch.optim.AdamW(settings, betas=BETAS, eps=EPS, fused=True)
    for step in range(3):
        _update(models[0], ours, step, most)
        _give_gradients(models[1], step)
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), math.inf if most is None else most)
        for group, of_ours in zip(theirs.param_groups, ours.param_groups, strict=True):
            group["lr"] = of_ours["lr"]
        theirs.step()
        saved = [optimizer.state_dict() for optimizer in (ours, theirs)]
        for number, state in saved[0]["state"].items():
            assert state.keys() == saved[1]["state"][number].keys()
            for kind, value in state.items():
                torch.testing.assert_close(value, saved[1]["state"][number][kind], rtol=1e-5, atol=1e-9)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        load_optimizer_state(ours, copy.deepcopy(saved[1]))
        assert ours.param_groups[0]["betas"] == BETAS


def test_parameters_without_a_gradient_stay():
    recipe = _small()
    model = build_model(recipe, torch.device("cpu"))
    optimizer = build_optimizer(model, recipe)
    _give_gradients(model, 0)
    model.dec_mod_emb.weight.grad = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == "dec_mod_emb.weight"), name
        assert (p in optimizer.state) == (name != "dec_mod_emb.weight"), name


BINS = 20  # of 50 rows


def _of_bins(**changes):
    return _small(**{"vocab_sizes": [50, BINS] * 2, "coords_lr_scale": 2.0, **changes})


def _halves(model, rows):
    """A model's parameters as ones of their own; the vocabulary's two as rows of bins and rows of others."""
    found = {}
    for name, p in model.named_parameters():
        cuts = {f"{name} bins": p[:rows], f"{name} others": p[rows:]} if _is_vocabulary(name) else {name: p}
        found |= {key: torch.nn.Parameter(part.detach().clone()) for key, part in cuts.items()}
    return found


def _is_vocabulary(name):
    return name in ("enc_tok_emb.weight", "to_logits.weight")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tensor_rates", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_rows_of_bins_are_updated_as_parameters_of_their_own(kernels, tensor_rates, optimizer):
    """To the bit: with 0.5 and 0.25 times the rate beside 1. A step that may not update leaves them, and its count."""
    recipe = _of_bins(kernels=kernels, coords_lr_scale=0.5, optimizer=optimizer)
    model = build_model(recipe, torch.device("cpu"))
    ours = build_optimizer(model, recipe)
    if tensor_rates:
        keep_rates_on(ours, torch.device("cpu"))
    parts = _halves(model, BINS)
    names = [name for name in parts if optimizer == "adamw" or ".blocks." not in name or parts[name].ndim < 2]
    theirs = AdamW(
        [
            {
                "params": [parts[name]],
                "weight_decay": 0.05 if parts[name].ndim >= 2 else 0.0,
                "lr_scale": 0.5 if name.endswith(" bins") else 0.25 if name.endswith(" others") else 1.0,
            }
            for name in names
        ],
        recipe,
    )
    for step in range(4):
        blocked = torch.tensor(float(step == 2))
        _give_gradients(model, step)
        for name, p in model.named_parameters():
            if _is_vocabulary(name):
                parts[f"{name} bins"].grad, parts[f"{name} others"].grad = (
                    part.clone() for part in (p.grad[:BINS], p.grad[BINS:])
                )
            else:
                parts[name].grad = p.grad.clone()
        for one in (ours, theirs):
            one.found_inf, one.grad_factor = blocked, torch.tensor(0.5)
            set_learning_rate(one, 0.01 / (step + 1))
            one.step()
        now = _halves(model, BINS)
        for name in names:
            assert torch.equal(now[name], parts[name]), (step, name)
        for name, p in model.named_parameters():
            if _is_vocabulary(name):
                assert ours.state[p]["step"] == step + (step < 2)
                for moment in ("exp_avg", "exp_avg_sq"):
                    halves = [theirs.state[parts[f"{name} {half}"]][moment] for half in ("bins", "others")]
                    assert torch.equal(ours.state[p][moment], torch.cat(halves))


@pytest.mark.parametrize("bins", [BINS, 50])
def test_a_rate_for_bins_changes_no_state(bins):
    """Entries and shapes are those of a run without; and those settings of the groups."""
    saved = []
    for scale in (None, 0.5):
        recipe = _of_bins(coords_lr_scale=scale, vocab_sizes=[50, bins] * 2)
        model = build_model(recipe, torch.device("cpu"))
        optimizer = build_optimizer(model, recipe)
        _update(model, optimizer, 0, 1.0)
        saved.append(optimizer.state_dict())
    shapes = [{n: {kind: v.shape for kind, v in s.items()} for n, s in one["state"].items()} for one in saved]
    assert shapes[0] == shapes[1]
    assert all(state["step"] == 1 for state in saved[1]["state"].values())
    assert [group["params"] for group in saved[0]["param_groups"]] == [g["params"] for g in saved[1]["param_groups"]]
    assert not any("bins" in key for group in saved[0]["param_groups"] for key in group)
    assert saved[1]["param_groups"][-1]["bins"] == bins


def test_a_rate_for_bins_as_the_vocabularys_is_none():
    """And with ``vocab_lr_scale`` 1 the rows have a group of their own."""
    assert not any("bins" in group for group in _groups(_of_bins(coords_lr_scale=0.25)))
    groups = _groups(_of_bins(vocab_lr_scale=1.0))
    assert [group.get("bins") for group in groups] == [None, None, BINS]
    assert [group["lr_scale"] for group in groups[2:]] == [1.0]


def _groups(recipe):
    return build_optimizer(build_model(recipe, torch.device("cpu")), recipe).param_groups


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_vocabulary_has_an_epsilon_of_its_own(kernels, optimizer):
    """What torch's AdamW does with that epsilon; all else keeps 1e-8."""
    recipe = _small(vocab_eps=1e-3, kernels=kernels, optimizer=optimizer)
    model = build_model(recipe, torch.device("cpu"))
    ours = build_optimizer(model, recipe)
    groups = [group for group in ours.param_groups if "betas" in group]
    assert [group["eps"] for group in groups] == [EPS] * (len(groups) - 1) + [1e-3]
    vocabulary = {name: p for name, p in model.named_parameters() if _is_vocabulary(name)}
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in vocabulary.values()}
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in vocabulary.items()}
    theirs = torch.optim.AdamW(copies.values(), lr=0.01, betas=BETAS, eps=1e-3, weight_decay=0.05)
    for step in range(3):
        _give_gradients(model, step)
        for name, p in vocabulary.items():
            copies[name].grad = p.grad.clone()
        set_learning_rate(ours, 0.01 / recipe.vocab_lr_scale)
        ours.step()
        theirs.step()
    for name, p in vocabulary.items():
        torch.testing.assert_close(p, copies[name], rtol=1e-5, atol=1e-6)


def test_with_an_epsilon_rows_that_hardly_occur_stay():
    """A push of a thousandth of what others get, every step: Adam moves the row by the rate, an epsilon damps that."""
    moved = {}
    for eps in (EPS, 1e-4):
        recipe = _small(vocab_eps=eps, weight_decay=0.0)
        model = build_model(recipe, torch.device("cpu"))
        optimizer, rows = build_optimizer(model, recipe), model.to_logits.weight
        before = rows.detach().clone()
        for _ in range(20):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            rows.grad[0], rows.grad[1] = 1e-3, 1e-6
            set_learning_rate(optimizer, 0.01)
            optimizer.step()
        moved[eps] = (rows.detach() - before).abs().mean(1).tolist()
    assert moved[EPS][1] == pytest.approx(moved[EPS][0], rel=0.02)
    assert moved[1e-4][1] < 0.02 * moved[1e-4][0]
    assert moved[1e-4][0] > 0.8 * moved[EPS][0]
