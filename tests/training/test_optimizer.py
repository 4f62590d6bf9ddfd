"""Decay groups and the learning rate over counted tokens."""

import math

import pytest
import torch

from m4.build import build_model
from m4.config import ModelSection, TrainConfig
from m4.schedule import learning_rate
from m4.training.optimizer import build_optimizer, set_learning_rate


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
