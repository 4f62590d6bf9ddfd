"""`benchmarks.profile_step`: every operator of a step is found, in its part, with the operations that it does."""

import dataclasses
import json
import sys
import time

import pytest
import torch

from benchmarks import profile_step, profiled
from benchmarks.profile_step import Steps
from benchmarks.profiled import ATTENTION, ATTENTION_BACKWARD, FORWARD, GRAD_WEIGHT, GRAD_X, LOSS, PARTS, Rates
from m4.errors import ConfigError
from m4.model.flops import training_flop
from m4.training.optimizer import MuonAndAdamW
from m4kernels.ops.linear import api

RATES = Rates(products=1e9, copying=1e8)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def steps(config, monkeypatch):
    monkeypatch.setattr(profile_step, "WARM_UP_S", 0.0)
    config = dataclasses.replace(config, vocab_sizes=[4096, 2000, 4096, 2000], batch_size=4, global_batch_size=8)
    return Steps(config, time.thread_time)


def flop(found, *parts):
    return sum(found["parts"][part]["flop"] for part in parts)


@pytest.mark.parametrize("own", [False, True])
def test_floating_point_operations_are_those_of_the_convention(steps, monkeypatch, own):
    """Of two micro-batches: those of linear layers and of the loss, in three products of a size, whoever multiplies."""
    if own:
        monkeypatch.setattr(api, "FEWEST_ROWS", 1)
        monkeypatch.setattr(api, "NARROWEST", 1)
        monkeypatch.setattr(api, "why_not_own_products", lambda dtype: None)
    found = steps.profile("auto", 2, RATES)
    products = flop(found, FORWARD, GRAD_X, GRAD_WEIGHT, LOSS)
    assert products == pytest.approx(found["flop"])
    assert flop(found, FORWARD) == flop(found, GRAD_X) == flop(found, GRAD_WEIGHT) > 0
    assert any(row["name"] == "m4kernels::linear_backward" for row in found["operators"]) == own
    assert flop(found, ATTENTION_BACKWARD) == 2.5 * flop(found, ATTENTION) > 0
    assert set(found["parts"]) == {*PARTS, "calls, autograd, Python"}
    assert sum(part["s"] for part in found["parts"].values()) == pytest.approx(found["step_s"])
    assert sum(part["floor_s"] for part in found["parts"].values()) == pytest.approx(found["floor_s"])


@pytest.mark.parametrize("kernels", ["reference", "reference-matmul"])
def test_of_the_padded_reference(steps, kernels):
    """Its slots in place of tokens, all classes for every one of them, all pairs of slots."""
    found, model = steps.profile(kernels, 1, RATES), steps.trainer.model.config
    slots = [sum(width) for width in zip(*map(slots_of, steps.batches), strict=True)]
    everything = dataclasses.replace(model, vocab_sizes=(model.vocabulary,) * 4)
    expected = training_flop(everything, slots[0], [slots[1], 0, 0, 0])
    assert flop(found, FORWARD, GRAD_X, GRAD_WEIGHT, LOSS) == pytest.approx(expected)
    pairs = sum(pairs_of(batch) for batch in steps.batches) * model.dim
    assert flop(found, ATTENTION) == pytest.approx(4 * pairs)
    times = 5 if kernels == "reference" else 4  # scores need not be multiplied again where they are kept
    assert flop(found, ATTENTION_BACKWARD) == pytest.approx(2 * times * pairs)


def slots_of(batch):
    return [half.segments.max_seqlen * half.segments.batch_size for half in (batch.encoder, batch.decoder)]


def pairs_of(batch):
    """Of slots: a layer of the encoder, and one of the decoder with its cross-attention."""
    inputs, targets = batch.encoder.segments.max_seqlen, batch.decoder.segments.max_seqlen
    return batch.encoder.segments.batch_size * (inputs**2 + targets**2 + inputs * targets)


def test_with_muon(config, monkeypatch):
    """What `M4-tiny.yaml`, the default, has: AdamW does the rows of the vocabulary, in one pass or torch's."""
    monkeypatch.setattr(profile_step, "WARM_UP_S", 0.0)
    steps = Steps(dataclasses.replace(config, optimizer="muon"), time.thread_time)
    for kernels, in_one_pass in (("reference", False), ("auto", True)):
        found = steps.profile(kernels, 1, RATES)
        assert found["parts"][profiled.UPDATE]["calls"] > 0
        optimizer = steps.trainer.optimizer
        assert isinstance(optimizer, MuonAndAdamW)
        assert optimizer.adamw.in_one_pass == in_one_pass


def test_what_tensors_weigh(steps):
    """Views weigh nothing; what is changed is read and written; of an embedding only the rows that are looked up."""
    profile = profiled.Profile(steps.sizes(), time.thread_time)
    x, weight = torch.zeros(8, 4), torch.zeros(100, 4)
    with profile:
        x.t()
        x.add_(1.0)
        x + x
        torch.nn.functional.embedding(torch.tensor([3, 5]), weight)
    weights = {row.name: row.bytes for row in profile.rows.values()}
    assert weights["aten::t"] == 0
    assert weights["aten::add_"] == 2 * x.nbytes
    assert weights["aten::add"] == 3 * x.nbytes
    assert weights["aten::embedding"] == 2 * 2 * 16


def test_the_command(tiny_config, tmp_path, monkeypatch, capsys):
    out = tmp_path / "profile.json"
    monkeypatch.setattr(profile_step, "machine_rates", lambda clock: {"PyTorch float32": 1e11, "copying": 1e10})
    arguments = ["--config", str(tiny_config), "--kernels", "auto,reference", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["profile_step", *arguments])
    assert profile_step.main() == 0
    found = json.loads(out.read_text())
    ours, theirs = found["steps"]["auto"], found["steps"]["reference"]
    assert found["ratios"]["reference over auto"] == pytest.approx(theirs["step_s"] / ours["step_s"])
    assert found["ratios"]["reference over auto, at its floor"] == pytest.approx(theirs["step_s"] / ours["floor_s"])
    said = capsys.readouterr().out
    assert "1 threads; PyTorch float32 100.0 G/s; copying 10.0 G/s" in said
    assert "kernels: reference" in said
    monkeypatch.setattr(sys, "argv", ["profile_step", "--kernels", "auto,fast"])
    with pytest.raises(ConfigError, match="--kernels: expected some of auto, reference, reference-matmul"):
        profile_step.main()


def test_rates_of_this_machine(monkeypatch):
    """Each library is named; floors are of the faster."""
    monkeypatch.setattr(profile_step, "best", lambda run, clock, times=5: (run(), 0.5)[1])
    rates = profile_step.machine_rates(time.thread_time)
    assert rates["PyTorch float32"] == 2 * 2048**3 / 0.5
    assert rates["copying"] == 2**30
    assert profile_step.floor_rates(rates).products == max(rates["PyTorch float32"], rates.get("oneDNN float32", 0))
