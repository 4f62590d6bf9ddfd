"""Activation checkpointing: the same bits for less memory. A profile of a few steps."""

import dataclasses
import json

import pytest
import torch

from m4.training.profiling import STEPS_BEFORE, TABLE_FILE, TRACE_FILE, StepProfiler
from m4.training.trainer import Trainer
from tests.training.step_setup import ON_A_CPU, Steps, assert_same

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_train_config):
    model = dataclasses.replace(tiny_train_config.model, enc_depth=3, dec_depth=3)
    return dataclasses.replace(tiny_train_config, model=model)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputed_blocks_give_the_same_bits(config, dtype):
    config = dataclasses.replace(config, dtype=dtype)
    weights, figures = [], []
    for recompute in (False, True):
        setup = Steps(dataclasses.replace(config, activation_checkpointing=recompute), execution=ON_A_CPU)
        figures += setup.run(2)
        weights.append(setup.weights())
    assert_same(*weights, rtol=0, atol=0)
    assert [one.losses for one in figures[:2]] == [one.losses for one in figures[2:]]


def test_less_is_kept_for_the_backward_pass(config):
    """By the bytes that autograd saves in a forward pass."""
    kept = []
    for recompute in (False, True):
        trainer = Trainer(dataclasses.replace(config, activation_checkpointing=recompute))
        (batch, *_) = trainer.batches.step(0).micro_batches
        found: dict[int, int] = {}

        def save(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            trainer.model(batch.masked)
        kept.append(sum(size for place, size in found.items() if place not in own))
    assert kept[1] < 0.5 * kept[0]


def test_references_keep_all(config):
    with pytest.raises(ValueError, match=r"activation_checkpointing: .*kernels=reference"):
        dataclasses.replace(config, activation_checkpointing=True, kernels="reference")


def test_a_profile_is_a_trace_and_a_table(config, caplog):
    config = dataclasses.replace(config, profile=True, stop_after_steps=8, eval_generate_samples=0, eval_freq=100)
    assert Trainer(config).run("command") == 0
    trace = json.loads((config.run_dir / TRACE_FILE).read_text())
    assert any("cross_modal_attention" in event.get("name", "") for event in trace["traceEvents"])
    table = (config.run_dir / TABLE_FILE).read_text()
    rows = table.split("\n")[3:]
    assert len([row for row in rows if row.strip() and not row.startswith(("-", "Self"))]) == 10
    assert not list(config.run_dir.glob(".*.tmp"))


def test_too_short_for_a_profile(config, caplog):
    profiler = StepProfiler(dataclasses.replace(config, profile=True), CPU)
    for _ in range(STEPS_BEFORE - 1):
        profiler.step()
    profiler.close()
    assert "nothing was traced" in caplog.text
