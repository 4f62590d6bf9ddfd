"""The step as a GPU runs it (fixed shapes, static tensors, figures read late), exercised on the CPU; graphs on CUDA."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import m4.batches.train
import m4.training.trainer
from m4.batches.rows import TokenRows
from m4.build import data_root, open_split
from m4.checkpoint import newest_whole
from m4.config import load_config
from m4.errors import ConfigError
from m4.training.optimizer import build_optimizer, load_optimizer_state
from m4.training.step import Execution
from m4.training.trainer import Trainer
from tests.runs import environment
from tests.training.step_setup import (
    AS_ON_A_GPU,
    CPU,
    ON_A_CPU,
    OPS,
    ForbidReading,
    PlainRecorder,
    Steps,
    assert_same,
    logged_losses,
)


@pytest.mark.parametrize("setting", [{}, {"dtype": "bf16"}, {"kernels": "reference"}], ids=str)
def test_fixed_shapes_change_nothing_but_the_order_of_sums(config, setting):
    """Tail tokens count for nothing and dealt samples are those of the step: losses, norms and updates agree."""
    config = dataclasses.replace(config, **setting)
    ragged, fixed = Steps(config, execution=ON_A_CPU), Steps(config)
    loose = {"rel": 2e-2} if config.dtype == "bf16" else {"rel": 1e-4}
    for a, b in zip(ragged.run(3), fixed.run(3), strict=True):
        assert b.losses == pytest.approx(a.losses, **loose)
        assert b.norm == pytest.approx(a.norm, **loose)
        assert (a.finite, a.updates) == (b.finite, b.updates) == (True, 1)
    if config.dtype == "fp32":
        assert_same(ragged.weights(), fixed.weights(), rtol=2e-3, atol=2e-5)


def _samples(masked):
    """Ids, positions and modalities of the inputs and targets of each sample."""
    for b in range(masked.encoder.segments.batch_size):
        sample = []
        for half in (masked.encoder, masked.decoder):
            part = slice(*half.segments.cu_seqlens[b : b + 2].tolist())
            sample += [half.ids[part].tolist(), half.positions[part].tolist(), half.modalities[part].tolist()]
        yield sample


def test_micro_batches_have_one_shape_and_the_samples_of_the_step(config):
    fixed, ragged = Steps(config), Steps(config, execution=ON_A_CPU)
    seen = set()
    for index in range(4):
        steps = [side.batches.step(index * 8) for side in (fixed, ragged)]
        assert torch.equal(steps[0].counts, steps[1].counts)
        batches = [list(step.micro_batches) for step in steps]
        assert sum(b.valid_tokens for b in batches[0]) == sum(b.valid_tokens for b in batches[1])
        for batch in batches[0]:
            masked = batch.masked
            seen.add((len(masked.encoder.ids), len(masked.decoder.ids), batch.samples))
            assert batch.valid_tokens == masked.encoder.segments.counts.sum() + masked.decoder.segments.counts.sum()
        content = [sorted(row for batch in side for row in _samples(batch.masked)) for side in batches]
        assert content[0] == content[1]
    assert len(seen) == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_recorded_functions_are_the_step(config, accumulation):
    """Static tensors, warm-up without trace, gradients handed over by the first micro-batch: the same bits."""
    config.global_batch_size = 4 * accumulation
    plain, recorder = Steps(config), PlainRecorder()
    before = plain.weights()
    recorded = Steps(config).record(recorder)
    assert recorder.recorded == 2 + (accumulation > 1)
    assert_same(before, recorded.weights(), rtol=0, atol=0)
    assert plain.run(4) == recorded.run(4)
    assert_same(plain.weights(), recorded.weights(), rtol=0, atol=0)
    steps = {int(state["step"]) for state in recorded.optimizer.state.values()}
    assert steps == {4}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_of_several_sizes(config, accumulation, monkeypatch):
    """Each is recorded; which of them a step takes follows from its tokens; the bits are those of steps as they are."""
    monkeypatch.setattr(m4.batches.packing, "GRANULE", 4)
    config.global_batch_size = 4 * accumulation
    plain, recorder = Steps(config), PlainRecorder()
    recorded = Steps(config).record(recorder)
    pairs = recorded.batches.capacities.pairs()
    assert len(pairs) > 3
    assert recorder.recorded == len(pairs) * (2 + (accumulation > 1))
    taken = set()
    usual = type(recorded.step).micro_batch

    def micro_batch(step, batch):
        taken.add((len(batch.encoder.ids), len(batch.decoder.ids)))
        usual(step, batch)

    monkeypatch.setattr(type(recorded.step), "micro_batch", micro_batch)
    assert plain.run(12) == recorded.run(12)
    assert len(taken & set(pairs)) > 2
    assert_same(plain.weights(), recorded.weights(), rtol=0, atol=0)


def test_micro_batches_of_a_recorded_step_have_one_shape(config, monkeypatch):
    monkeypatch.setattr(m4.batches.packing, "GRANULE", 4)
    setup = Steps(config).record(PlainRecorder())
    small, *_, large = setup.batches.examples(0)
    setup.step.start(setup.batches.step(0).counts, 1e-3)
    setup.step.micro_batch(small)
    with pytest.raises(ValueError, match="must have the same shapes"):
        setup.step.micro_batch(large)


def test_a_step_that_does_not_fit_runs_at_a_larger_capacity(config, monkeypatch):
    """Through the model as it is, not through its compiled form, which is for one shape."""
    config.compile, compiled = True, []

    def pretend(model, dynamic):
        assert not dynamic

        def forward(batch, **counts):
            compiled.append(len(batch.decoder.ids))
            return model(batch, **counts)

        return forward

    monkeypatch.setattr(torch, "compile", pretend)
    plain, recorded = Steps(config), Steps(config).record(PlainRecorder())
    usual = m4.batches.train.deal
    compiled.clear()
    for index in range(4):
        if index == 2:  # as if the step after it, which it prepares, had many more tokens than the mean
            monkeypatch.setattr(m4.batches.train, "deal", lambda *arguments: (usual(*arguments)[0], (256, 256)))
        else:
            monkeypatch.setattr(m4.batches.train, "deal", usual)
        for setup in (plain, recorded):
            setup.launch()
        assert plain.step.read() == recorded.step.read()
    assert set(compiled) == {128}
    assert len(compiled) == 2 * 2 * 3  # of four steps, one is larger
    assert_same(plain.weights(), recorded.weights(), rtol=0, atol=0)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_nothing_reads_values_between_log_points(config, recorded, kernels):
    def refuse(*_):
        raise AssertionError("a tensor's value is read on the host")

    setup = Steps(dataclasses.replace(config, kernels=kernels))
    if recorded:
        setup.record(PlainRecorder())
    setup.run(1)
    setup.batches.prepare(8)  # on the host, of numbers that never were on the device
    with ForbidReading(), pytest.MonkeyPatch.context() as patch:
        for method in ("tolist", "__bool__", "__int__", "__float__", "cpu"):  # not all of them are operators on a CPU
            patch.setattr(torch.Tensor, method, refuse)
        setup.launch()
    assert setup.step.read().updates == 1
    with pytest.raises(AssertionError, match="reads values"), ForbidReading():
        setup.model.pos_emb.sum().item()


def test_step_through_triton(config, monkeypatch):
    """Masking, both attentions, loss and their gradients on batches with tails, by the kernels of a GPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton is not interpreted here: with a GPU it runs in the tests marked cuda")
    lacking = [op for op in OPS if "triton" not in import_module(f"m4kernels.ops.{op}.api").dispatcher.backends]
    if lacking:
        pytest.skip(f"no backend triton yet: {', '.join(lacking)}")
    config.batch_size, config.global_batch_size = 2, 4
    figures, weights = [], []
    for backend in ("", "triton"):
        monkeypatch.setenv("M4KERNELS_BACKEND", backend)
        setup = Steps(config)
        figures += setup.run(1)
        weights.append(setup.weights())
    assert figures[1].losses == pytest.approx(figures[0].losses, rel=1e-5)
    assert figures[1].norm == pytest.approx(figures[0].norm, rel=1e-4)
    assert_same(*weights, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("recorded", [False, True])
def test_after_a_step_that_is_not_finite_nothing_changes(config, recorded):
    setup = Steps(config)
    if recorded:
        setup.record(PlainRecorder())
    setup.run(2)
    with torch.no_grad():
        healthy = setup.model.dec_norm.weight.clone()
        setup.model.dec_norm.weight[0] = torch.inf
    before = setup.weights()
    moments = [state["exp_avg"].clone() for state in setup.optimizer.state.values()]
    setup.launch()
    with torch.no_grad():
        setup.model.dec_norm.weight.copy_(healthy)  # later steps are finite again, and still do not count
    before["dec_norm.weight"] = healthy.clone()
    setup.launch()
    figures = setup.step.read()
    assert not figures.finite
    assert figures.updates == 0
    assert not all(np.isfinite([*figures.losses, figures.norm]))
    assert_same(before, setup.weights(), rtol=0, atol=0)
    after = [state["exp_avg"] for state in setup.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert {int(state["step"]) for state in setup.optimizer.state.values()} == {2}


def test_settings_of_the_optimizer_are_not_loaded(config):
    """A run captured on a GPU resumes on a CPU, and the reverse."""
    setup = Steps(config)
    setup.run(1)
    saved = setup.optimizer.state_dict()
    saved["param_groups"][0]["capturable"] = True
    optimizer = build_optimizer(setup.model, config)
    load_optimizer_state(optimizer, saved)
    assert not optimizer.param_groups[0]["capturable"]
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    assert optimizer.param_groups[0]["weight_decay"] == config.weight_decay
    assert all(torch.equal(optimizer.state[p]["exp_avg"], s["exp_avg"]) for p, s in setup.optimizer.state.items())


def test_rows_of_a_resident_store_are_those_of_the_file(config):
    store = open_split(config, data_root(config), "train")
    rows = np.array([3, 0, 3])
    expected = store.tokens[rows]
    for resident in (False, True):
        table = TokenRows(store, CPU, resident=resident)
        tokens = table.tokens(rows, torch.from_numpy(rows))
        assert tokens.dtype == torch.uint16
        np.testing.assert_array_equal(tokens.numpy(), expected)


def test_training_as_on_a_gpu(config, monkeypatch):
    """The whole trainer with fixed shapes and late reading: the same losses; a resumed run ends with the same bits."""
    config.log.every, config.stop_after_steps = 3, 10
    assert Trainer(dataclasses.replace(config, run_name="usual")).run("command") == 0
    monkeypatch.setattr(m4.training.trainer.Execution, "of", lambda *_: AS_ON_A_GPU)
    straight = dataclasses.replace(config, run_name="straight")
    assert Trainer(straight).run("command") == 0
    usual = logged_losses(dataclasses.replace(config, run_name="usual"))
    assert logged_losses(straight).keys() == usual.keys() == {3, 6, 9}
    assert logged_losses(straight) == pytest.approx(usual, rel=1e-3)
    pieces = dataclasses.replace(config, run_name="pieces", stop_after_steps=4)
    assert Trainer(pieces).run("command") == 0
    assert Trainer(dataclasses.replace(pieces, stop_after_steps=10)).run("command") == 0
    weights = [load_file(newest_whole(c.run_dir)[0] / "model.safetensors") for c in (straight, pieces)]
    assert_same(*weights, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_is_dated_right_when_read_late(config, monkeypatch):
    monkeypatch.setattr(m4.training.trainer.Execution, "of", lambda *_: AS_ON_A_GPU)
    config.lr, config.log.every, config.save_ckpt_freq, config.eval_freq = 1e30, 4, 100, 100
    with pytest.raises(ValueError, match=r"step (\d+): .*lower lr") as caught:
        Trainer(config).run("command")
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert f"step {summary['steps'] + 1}:" in str(caught.value)
    assert summary["samples"] == 8 * summary["steps"]
    assert summary["steps"] < 4


def test_the_two_tiny_configurations_are_one(tiny_train_config, tiny_config):
    same = dataclasses.replace(load_config(tiny_config)[0], data=tiny_train_config.data)
    assert same == tiny_train_config


def test_training_needs_no_omegaconf(tiny_train_config):
    """Nor does resuming: on a machine with a GPU it may be missing."""
    program = (
        "import sys; sys.modules['omegaconf'] = None\n"
        "from m4.config import DataSection, LogSection, ModelSection, TrainConfig\n"
        "from m4.training.trainer import Trainer\n"
        f"config = {tiny_train_config!r}\n"
        "for config.stop_after_steps in (1, 2):\n    assert Trainer(config).run('command') == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert newest_whole(tiny_train_config.run_dir)[1]["step"] == 2


def test_a_gpu_without_bfloat16_is_told(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(
        ConfigError, match=r"dtype: bf16 needs .* 8\.0 or more, cuda has 7\.0; use dtype=fp16 or dtype=fp32"
    ):
        Execution.of(dataclasses.replace(config, dtype="bf16"), torch.device("cuda"))
    assert Execution.of(config, torch.device("cuda")).asynchronous


def test_cuda_graphs_key(config, tiny_config):
    for text, value in (("on", "on"), ("off", "off"), ("auto", "auto")):
        assert load_config(tiny_config, [f"cuda_graphs={text}"])[0].cuda_graphs == value
    with pytest.raises(ConfigError, match="cuda_graphs: expected auto, on or off, got 'perhaps'"):
        load_config(tiny_config, ["cuda_graphs=perhaps"])
    with pytest.raises(ConfigError, match="cuda_graphs: on needs a GPU"):
        Execution.of(dataclasses.replace(config, cuda_graphs="on"), CPU)
    assert Execution.of(config, CPU) == Execution(False, False)
    gpu = torch.device("cuda")
    assert Execution.of(config, gpu) == Execution(True, True)
    assert Execution.of(dataclasses.replace(config, cuda_graphs="off"), gpu) == Execution(True, False)
    assert Execution.of(dataclasses.replace(config, kernels="reference"), gpu) == Execution(True, False)
