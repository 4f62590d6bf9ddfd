"""Averaged weights beside the trained ones; Muon for the matrices of the trunk: by their definitions, and resumed."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import m4.evaluate
import m4.generate
from m4.build import build_model
from m4.checkpoint import EMA_FILE, MODEL_FILE, newest_whole
from m4.errors import ConfigError
from m4.run.metrics import read_metrics
from m4.saved_run import SavedRun
from m4.training import muon
from m4.training.adamw import BETAS, EPS
from m4.training.ema import AveragedWeights
from m4.training.muon import orthogonalised
from m4.training.optimizer import build_optimizer, set_learning_rate
from m4.training.step import Execution
from m4.training.trainer import Trainer
from tests.training.step_setup import PlainRecorder, Steps, assert_same

CPU = torch.device("cpu")
STEP = 0.008


@pytest.fixture
def config(tiny_train_config):
    return dataclasses.replace(
        tiny_train_config, total_tokens=6 * STEP, token_warmup=STEP, eval_freq=3 * STEP, save_ckpt_freq=100,
        eval_samples=2, eval_generate_samples=0, log=dataclasses.replace(tiny_train_config.log, every=1),
    )  # fmt: skip


def _newest(config, name=MODEL_FILE):
    return load_file(newest_whole(config.run_dir)[0] / name)


@pytest.mark.parametrize("recorded", [False, True])
def test_the_average_is_its_formula_and_skipped_steps_leave_it(config, recorded):
    setup = Steps(dataclasses.replace(config, ema=0.75, skip_non_finite=1))
    averaged = setup.trainer.averaged
    averaged.start_over()  # Steps has set the head
    if recorded:
        setup.record(PlainRecorder())
    expected = {name: weight.double() for name, weight in setup.weights().items()}
    for step in range(4):
        if step == 2:  # one that is skipped
            healthy = setup.model.dec_norm.weight.detach().clone()
            setup.model.dec_norm.weight.data[0] = torch.nan
            setup.step._averaged = None  # the average of a weight that was spoilt from outside is not the point
            setup.launch()
            setup.step._averaged = averaged
            setup.model.dec_norm.weight.data.copy_(healthy)
            before = {name: p.clone() for name, p in averaged.model.named_parameters()}
            averaged.update(setup.step._guard.found_inf)
            assert_same(before, dict(averaged.model.named_parameters()), rtol=0, atol=0)
            continue
        setup.launch()
        for name, weight in setup.weights().items():
            expected[name] = 0.75 * expected[name] + 0.25 * weight.double()
    for name, average in averaged.model.named_parameters():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert not average.requires_grad


def test_averages_are_evaluated_saved_resumed_and_used(config, tmp_path, capsys, monkeypatch):
    straight = dataclasses.replace(config, run_name="straight", ema=0.9)
    assert Trainer(straight).run("command") == 0
    pieces = dataclasses.replace(straight, run_name="pieces")
    assert Trainer(dataclasses.replace(pieces, stop_after_steps=2)).run("command") == 0
    assert Trainer(pieces).run("command") == 0
    for name in (MODEL_FILE, EMA_FILE):
        assert_same(_newest(pieces, name), _newest(straight, name), rtol=0, atol=0)
    # The trained weights are those of a run without averages.
    without = dataclasses.replace(config, run_name="without")
    assert Trainer(without).run("command") == 0
    assert_same(_newest(without), _newest(straight), rtol=0, atol=0)
    assert not torch.equal(_newest(straight, EMA_FILE)["to_logits.weight"], _newest(straight)["to_logits.weight"])
    last = [line for line in read_metrics(straight.run_dir / "metrics.jsonl") if line["kind"] == "eval"][-1]
    assert last["ema"]["loss"] != last["loss"]
    assert last["ema"]["per_modality"].keys() == last["per_modality"].keys()
    # m4.evaluate takes them.
    model = SavedRun.open(straight.run_dir, ema=True).model()
    assert_same(model.state_dict(), _newest(straight, EMA_FILE), rtol=0, atol=0)
    monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(straight.run_dir), "--ema", "--max-samples", "2"])
    assert m4.evaluate.main() == 0
    report = json.loads((straight.run_dir / "evaluation-eval.json").read_text())
    assert report["weights"] == "averaged"
    assert report["loss"] == pytest.approx(last["ema"]["loss"], rel=1e-6)
    assert "(averaged weights)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--ema: .*step-00000006 holds no averaged weights: .*ema=0"):
        SavedRun.open(without.run_dir, ema=True)


def test_averaging_may_begin_later_and_end(config, caplog):
    first = dataclasses.replace(config, stop_after_steps=3)
    assert Trainer(first).run("command") == 0
    weights = _newest(first)
    trainer = Trainer(dataclasses.replace(config, ema=0.5, stop_after_steps=3))
    trainer.resume()
    assert_same(trainer.averaged.model.state_dict(), weights, rtol=0, atol=0)
    assert "ema: 0.0 in the checkpoint, 0.5 now" in caplog.text
    assert Trainer(dataclasses.replace(config, ema=0.5, stop_after_steps=5)).run("command") == 0
    assert (newest_whole(config.run_dir)[0] / EMA_FILE).is_file()
    assert Trainer(config).run("command") == 0
    assert not (newest_whole(config.run_dir)[0] / EMA_FILE).exists()


def test_a_damaged_average_is_a_damaged_checkpoint(config):
    config = dataclasses.replace(config, ema=0.9, save_ckpt_freq=3 * STEP)
    assert Trainer(config).run("command") == 0
    path = newest_whole(config.run_dir)[0] / EMA_FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert newest_whole(config.run_dir)[1]["step"] == 3
    path.unlink()
    assert newest_whole(config.run_dir)[1]["step"] == 3


def test_averaged_weights_of_a_copy_do_not_share_memory(config):
    model = build_model(config, CPU)
    averaged = AveragedWeights(model, 0.9)
    with torch.no_grad():
        model.to_logits.weight.add_(1)
    averaged.update(torch.zeros(()))
    difference = model.to_logits.weight - averaged.model.to_logits.weight
    torch.testing.assert_close(difference, torch.full_like(difference, 0.9))


def _muon(config, **changes):
    return dataclasses.replace(config, optimizer="muon", **changes)


def test_which_parameters_muon_takes(config):
    model = build_model(config, CPU)
    optimizer = build_optimizer(model, _muon(config))
    taken = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    assert names == {
        name for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2
    }  # fmt: skip
    assert "encoder.blocks.0.attn.qkv_proj.weight" in names
    assert not names & {"enc_tok_emb.weight", "to_logits.weight", "dec_context_proj.weight"}
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())


def _by_singular_values(x, coefficients, steps, eps):
    """The Newton-Schulz iteration by its definition, in float64: a polynomial of every singular value."""
    a, b, c = coefficients
    u, values, v = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / values.norm().clamp(min=eps)
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return ((u * values) @ v).to(x.dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (24, 24), (96, 384), (384, 96)])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e8])
def test_newton_schulz_in_float32(shape, size):
    settings = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    x = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = _by_singular_values(x, *settings)
    # At most 3.45 x an error a step, and products of at most 384 numbers of size 1.
    torch.testing.assert_close(orthogonalised(x, *settings), expected, rtol=0, atol=3.45**5 * 384**0.5 * 2**-24)


@pytest.mark.parametrize("why", [None, "no instructions for bfloat16"])
def test_updates_are_those_of_the_two_optimizers(config, monkeypatch, why):
    monkeypatch.setattr(muon, "slow_bf16", lambda: why)
    if why:  # float32 in the place of bfloat16
        monkeypatch.setattr(sys.modules["torch.optim._muon"], "_zeropower_via_newtonschulz", _by_singular_values)
    models = [build_model(config, CPU) for _ in range(2)]
    ours = build_optimizer(models[0], _muon(config))
    ours.found_inf = torch.zeros(())
    named = list(models[1].named_parameters())
    matrices = [p for name, p in named if ".blocks." in name and p.ndim == 2]
    taken = {id(p) for p in matrices}
    theirs = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [p for _, p in named if p.ndim >= 2 and id(p) not in taken], "weight_decay": 0.05},
             {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}],
            betas=BETAS, eps=EPS, fused=True,
        ),
    ]  # fmt: skip
    random = torch.Generator().manual_seed(0)
    for rate in (0.01, 0.02, 0.005):
        gradients = [torch.randn(p.shape, generator=random) for p in models[0].parameters()]
        for model in models:
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
        for optimizer in (ours, *theirs):
            set_learning_rate(optimizer, rate)
            optimizer.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if why is None else {"rtol": 1e-4, "atol": 1e-6}
    assert_same(models[0].state_dict(), models[1].state_dict(), **tolerance)
    before = {name: p.clone() for name, p in models[0].state_dict().items()}
    momentum = [state["momentum_buffer"].clone() for state in ours.state.values() if "momentum_buffer" in state]
    ours.found_inf = torch.ones(())
    ours.step()
    assert_same(models[0].state_dict(), before, rtol=0, atol=0)
    after = [state["momentum_buffer"] for state in ours.state.values() if "momentum_buffer" in state]
    assert len(after) == len(matrices)
    assert all(torch.equal(a, b) for a, b in zip(momentum, after, strict=True))


def test_muon_resumes_to_the_same_bits(config):
    straight = _muon(config, run_name="straight", vocab_lr_scale=0.5, coords_lr_scale=2.0)
    assert Trainer(straight).run("command") == 0
    pieces = dataclasses.replace(straight, run_name="pieces")
    assert Trainer(dataclasses.replace(pieces, stop_after_steps=3)).run("command") == 0
    assert Trainer(pieces).run("command") == 0
    assert_same(_newest(pieces), _newest(straight), rtol=0, atol=0)
    adamw = dataclasses.replace(straight, optimizer="adamw")
    with pytest.raises(ValueError, match="optimizer is 'muon' there and 'adamw' now"):
        Trainer(adamw).run("command")


def test_muon_and_cuda_graphs(config):
    gpu = torch.device("cuda")
    execution = Execution.of(_muon(config), gpu)
    assert (execution.asynchronous, execution.graphs) == (True, False)
    with pytest.raises(ConfigError, match=r"cuda_graphs: on cannot capture optimizer=muon.*cuda_graphs=auto"):
        Execution.of(_muon(config, cuda_graphs="on"), gpu)


def test_muon_as_on_a_gpu_takes_the_same_steps(config):
    """Its rate is a number while AdamW's is a tensor."""
    setup = Steps(_muon(config))
    figures = setup.run(3)
    assert all(one.finite for one in figures)
    assert isinstance(setup.optimizer.muon.param_groups[0]["lr"], float)
    assert setup.optimizer.muon.param_groups[0]["lr"] == pytest.approx(
        float(setup.optimizer.adamw.param_groups[0]["lr"])
    )


def test_torch_without_muon(config, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"optimizer: muon needs torch 2.9 or newer.*optimizer=adamw"):
        build_optimizer(build_model(config, CPU), _muon(config))
