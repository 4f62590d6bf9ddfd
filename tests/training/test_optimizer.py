"""Decay groups and the learning rate over counted tokens."""

import copy
import math

import pytest
import torch

from m4.build import build_model
from m4.config import ModelSection, TrainConfig
from m4.schedule import learning_rate
from m4.training.adamw import BETAS, EPS, clip_factor
from m4.training.optimizer import build_optimizer, load_optimizer_state, set_learning_rate


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
    return TrainConfig(vocab_sizes=[50] * 4, vocab_lr_scale=0.25, model=model, **changes)


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
