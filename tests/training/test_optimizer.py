"""Decay groups and the learning rate over counted tokens."""

import math

import pytest
import torch

from m4.config import TrainConfig
from m4.schedule import learning_rate
from m4.training.optimizer import build_optimizer


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
