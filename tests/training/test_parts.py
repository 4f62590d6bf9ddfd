"""One step of training in this process: accumulation, non-finite losses, the smoke test, evaluation."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from m4.batches.masked import fixed_batches, mask_rows
from m4.batches.order import SampleOrder
from m4.build import build_model, data_root, masking_spec, open_split
from m4.checkpoint import newest_whole
from m4.config import load_config
from m4.evaluation.losses import evaluate
from m4.evaluation.unigram import count_tokens, unigram_baseline
from m4.run.metrics import read_metrics
from m4.schedule import Schedule
from m4.training.preflight import Probe, check_ids, check_targets
from m4.training.trainer import Trainer
from tests.runs import MODALITIES

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_config):
    return load_config(tiny_config)[0]


@pytest.fixture
def store(config):
    return open_split(config, data_root(config), "train")


@pytest.fixture
def model(config):
    """A model whose head is not zero, so that every parameter has a gradient."""
    model = build_model(config, CPU)
    with torch.no_grad():
        model.to_logits.weight.normal_(std=0.1)
    return model


def _gradients(model, batches):
    counts = torch.stack([batch.decoder.segments.counts.sum(0) for batch in batches]).sum(0)
    model.zero_grad()
    losses = [model(batch, target_counts=counts) for batch in batches]
    sum(loss.total for loss in losses).backward()
    per_modality = sum(loss.per_modality for loss in losses)
    return per_modality, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_accumulated_gradients_are_those_of_the_big_batch(config, store, model):
    spec, order = masking_spec(config), SampleOrder(len(store), config.seed)
    positions = np.arange(12)

    def masked(part):
        return mask_rows(store, order.rows(part), part, spec, seed=config.seed, device=CPU)

    whole_loss, whole = _gradients(model, [masked(positions)])
    for parts in (np.split(positions, 3), np.split(positions, [1, 7]), np.split(positions, 12)):
        loss, gradients = _gradients(model, [masked(part) for part in parts])
        torch.testing.assert_close(loss, whole_loss, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("batch_size", "global_batch_size", "world", "accumulation"),
    [(96, 512, 1, 5), (96, 512, 4, 1), (96, 96, 1, 1), (96, 10, 1, 1), (4, 18, 1, 4), (1, 7, 2, 4)],
)
def test_accumulation_is_rounded(config, batch_size, global_batch_size, world, accumulation):
    config.batch_size, config.global_batch_size = batch_size, global_batch_size
    schedule = Schedule.of(config, world)
    assert schedule.accumulation == accumulation
    assert schedule.samples_per_step == accumulation * batch_size * world


def test_recipe_plan():
    schedule = Schedule.of(load_config("M4-config.yaml")[0], 1)
    assert (schedule.samples_per_step, schedule.steps) == (480, 24415)
    assert sum(schedule.due(25, step) for step in range(schedule.steps + 1)) == 120
    assert sum(schedule.due(1000, step) for step in range(schedule.steps + 1)) == 3


@pytest.mark.parametrize("setting", [{"dtype": "bf16"}, {"kernels": "reference"}, {"clip_grad": None}])
def test_other_ways_to_train_learn_the_same(config, setting):
    """Three steps in bfloat16, on the padded reference or without clipping stay close to the usual ones."""
    config.stop_after_steps, config.run_name = 3, "usual"
    assert Trainer(config).run("command") == 0
    other = dataclasses.replace(config, run_name="other", **setting)
    assert Trainer(other).run("command") == 0
    losses = [
        [line["loss"] for line in read_metrics(c.run_dir / "metrics.jsonl") if line["kind"] == "train"]
        for c in (config, other)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert len(losses[0]) == 3
    path, _ = newest_whole(other.run_dir)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(path / "model.safetensors").values())


def _probe(config, store, model):
    return Probe(model, store, SampleOrder(len(store), config.seed), masking_spec(config), config, CPU)


def test_smoke_test_leaves_no_trace(config, store, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = _probe(config, store, model).smoke_test(0)
    assert report.per_sample > 0
    assert report.recipe_seconds(1000, 10) >= 1000 * report.per_sample
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_smoke_test_finds_a_loss_that_is_not_finite(config, store, model):
    with torch.no_grad():
        model.dec_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="smoke test: the loss of tok_rgb is nan"):
        _probe(config, store, model).smoke_test(0)


def test_smoke_test_finds_an_id_outside_its_vocabulary(config, store):
    config.vocab_sizes[2] = 30
    with pytest.raises(ValueError, match=r"training row \d+, tok_rgb_next position \d+: .* below 30 .*got (3|4)\d"):
        check_ids(store, np.arange(len(store)), config)


def test_smoke_test_finds_samples_without_targets(config, store):
    # All of the only modality that may be a target is always an input.
    config.input_alphas, config.target_alphas = [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"training row \d+ gets no target .*target_alphas"):
        check_targets(store, np.arange(4), np.arange(4), masking_spec(config), config)


def test_evaluation_is_the_mean_over_all_targets(config, model):
    store = open_split(config, data_root(config), "eval")
    config.target_alphas = [1.0, 1.0, 1.0, 1.0]  # so that each modality has targets in seven samples
    model.eval()

    def batches(size):
        return fixed_batches(store, masking_spec(config), seed=3, batch_size=size, max_samples=None, device=CPU)

    results = [evaluate(model, batches(size), config, CPU) for size in (1, 3, 100)]
    (batch,) = batches(100)
    nll = F.cross_entropy(model.logits(batch), batch.decoder.ids, reduction="none").detach()
    for result in results:
        assert result.samples == 7
        for m, name in enumerate(MODALITIES):
            chosen = nll[batch.decoder.modalities == m]
            assert result.targets[name] == len(chosen)
            assert result.per_modality[name] == pytest.approx(chosen.mean().item(), rel=1e-5)
        assert result.loss == pytest.approx(np.mean(list(result.per_modality.values())))


def test_unigram_baseline():
    train_counts = np.array([6, 2, 0, 0])
    figures = unigram_baseline(train_counts, np.array([3, 1, 0, 0]))
    assert figures.entropy == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert figures.cross_entropy == pytest.approx(figures.entropy, abs=1e-6)
    assert figures.uniform_weight == pytest.approx(0, abs=1e-5)
    # An id never seen in training: no weight on a fine grid does better than the one chosen.
    target_counts = np.array([3, 1, 2, 0])
    figures = unigram_baseline(train_counts, target_counts)
    grid = np.linspace(1e-6, 1, 10001)[:, None]
    p = (1 - grid) * train_counts / 8 + grid / 4
    best = -(target_counts[:3] / 6 * np.log(p[:, :3])).sum(1)
    assert figures.cross_entropy <= best.min() + 1e-7
    assert figures.uniform_weight == pytest.approx(grid[best.argmin(), 0], abs=1e-3)


def test_unigram_counts_follow_the_data(config, store):
    counts = count_tokens(store, config.vocab_sizes, config.max_seq_lens)
    rows = np.asarray(store.tokens)
    assert [c.sum() for c in counts] == [len(store) * length for length in MODALITIES.values()]
    np.testing.assert_array_equal(counts[1], np.bincount(rows[:, 12:18].ravel(), minlength=64))
