"""A run that diverged: nothing spoilt is the newest checkpoint, and what the message advises works."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from m4.checkpoint import MODEL_FILE, STATE_FILE, _digest, load_run, newest_whole
from m4.run.metrics import read_metrics
from m4.training.trainer import Trainer
from tests.training.step_setup import AS_ON_A_GPU, ON_A_CPU, assert_same

EVERY_STEP = 0.008


def _weights(config):
    return load_file(newest_whole(config.run_dir)[0] / MODEL_FILE)


def _checkpoints(config):
    return sorted(int(path.name[-8:]) for path in (config.run_dir / "checkpoints").iterdir())


def _change(config, **changes):
    return dataclasses.replace(config, **changes)


def _run(config, **keywords):
    return Trainer(config, **keywords).run("command")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, token_root):
    """A run of twenty steps with all its checkpoints."""
    from m4.config import load_config
    from tests.runs import write_config

    path = write_config(tmp_path_factory.mktemp("straight") / "tiny.yaml", token_root)
    config = load_config(path, ["keep_ckpts=9"])[0]
    assert _run(config) == 0
    return config


@pytest.fixture
def config(straight, tmp_path):
    return _change(straight, output_dir=str(tmp_path / "runs"))


@pytest.fixture
def finished(straight, config):
    """A copy of the finished run without its last checkpoint: steps 5, 10 and 15 of 20."""
    import shutil

    shutil.copytree(straight.run_dir, config.run_dir)
    shutil.rmtree(config.run_dir / "checkpoints" / "step-00000020")
    return config


@pytest.mark.parametrize("execution", [ON_A_CPU, AS_ON_A_GPU], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("lr", [1e38, 1e30, 1e12])
def test_first_steps_diverge(straight, config, lr, execution):
    """Nothing is saved, and the same command with a lower lr trains as if nothing had been."""
    diverging = _change(config, lr=lr, save_ckpt_freq=EVERY_STEP, eval_freq=100)
    with pytest.raises(ValueError, match=r"step \d+.*nothing of it was saved; there is no checkpoint yet") as caught:
        _run(diverging, execution=execution)
    assert f"a lower lr than {lr:g}" in str(caught.value)
    assert "starts from the beginning" in str(caught.value)
    assert _checkpoints(config) == []
    assert all(math.isfinite(line.get("loss", 0)) for line in read_metrics(config.run_dir / "metrics.jsonl"))
    assert _run(config) == 0
    assert_same(_weights(config), _weights(straight), rtol=0, atol=0)


@pytest.mark.parametrize("save_ckpt_freq", [EVERY_STEP, 100])
def test_a_resumed_run_diverges_and_the_advice_works(finished, caplog, save_ckpt_freq):
    """The newest checkpoint stays the last good one; lr may change and the log says so."""
    with pytest.raises(ValueError, match=r"the newest checkpoint is .*step-00000015.*lower lr") as caught:
        _run(_change(finished, lr=1e38, save_ckpt_freq=save_ckpt_freq))
    assert "these keys may change, and it resumes from there" in str(caught.value)
    assert "dtype=fp32" not in str(caught.value)  # it is
    assert _checkpoints(finished) == [5, 10, 15]
    caplog.clear()
    assert _run(_change(finished, lr=0.001, token_warmup=0.1, clip_grad=0.5)) == 0
    for said in (
        "lr: 0.002 in the checkpoint, 0.001 now",
        "token_warmup: 0.04 in the checkpoint, 0.1 now",
        "clip_grad: 1.0 in the checkpoint, 0.5 now",
    ):
        assert ("m4.training.trainer", logging.WARNING, said) in caplog.record_tuples
    assert newest_whole(finished.run_dir)[1]["config"]["lr"] == 0.001
    lines = [line for line in read_metrics(finished.run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert lines[-1]["step"] == 20
    assert lines[15]["lr"] < 0.001


def test_other_precision_may_help(finished):
    with pytest.raises(ValueError, match="or dtype=fp32"):
        _run(_change(finished, lr=1e38, dtype="bf16"))
    assert _run(_change(finished, clip_grad=None)) == 0


def _spoil_gradient(trainer):
    trainer.model.dec_norm.weight.register_hook(
        lambda gradient: gradient * torch.inf if trainer.state.step == 4 else gradient
    )


def _after_update(spoil):
    """Do something once the update of step 5 is done, whose loss and gradient were finite."""

    def prepare(trainer):
        update = trainer.step.update

        def update_and_spoil():
            update()
            if trainer.state.step == 4:
                with torch.no_grad():
                    spoil(trainer)

        trainer.step.update = update_and_spoil

    return prepare


def _infinite_weight(trainer):
    trainer.model.to_logits.weight[3, 2] = -torch.inf


def _huge_weights(trainer):
    trainer.model.to_logits.weight.fill_(3e38)


def _infinite_moment(trainer):
    trainer.optimizer.state[trainer.model.dec_norm.weight]["exp_avg_sq"][1] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "said", "steps"),
    [
        (_spoil_gradient, r"step 5: the losses are finite but the gradient norm is (inf|nan)", 4),
        (_after_update(_infinite_weight), r"after step 5 the weights of to_logits.weight are not finite", 5),
        (_after_update(_huge_weights), r"after step 5 the loss of tok_rgb is (inf|nan)", 5),
        (
            _after_update(_infinite_moment),
            r"after step 5 the optimiser's exp_avg_sq of dec_norm.weight is not finite",
            5,
        ),
    ],
)
def test_nothing_spoilt_is_saved(config, spoil, said, steps):
    """At the last step before a save: an overflow of the gradient, of the weights, of what the optimiser holds."""
    trainer = Trainer(_change(config, eval_freq=100, save_ckpt_freq=0.04))
    spoil(trainer)
    with pytest.raises(ValueError, match=said):
        trainer.run("command")
    assert _checkpoints(config) == []
    assert json.loads((config.run_dir / "summary.json").read_text())["steps"] == steps
    assert _run(config) == 0


def test_a_stop_signal_does_not_save_what_is_spoilt(config):
    """Ctrl-C after the update that overflowed, before anything read of it."""
    trainer = Trainer(_change(config, eval_freq=100, save_ckpt_freq=100))

    def spoil(trainer):
        _infinite_weight(trainer)
        trainer.stop.received = 2

    _after_update(spoil)(trainer)
    with pytest.raises(ValueError, match="after step 5 the weights of to_logits"):
        trainer.run("command")
    assert _checkpoints(config) == []


def test_an_evaluation_that_is_not_finite_is_not_recorded(config):
    trainer = Trainer(_change(config, eval_freq=0.04, save_ckpt_freq=100))
    _after_update(_huge_weights)(trainer)
    with pytest.raises(ValueError, match=r"evaluation after step 5: the loss of tok_rgb is (inf|nan).*lower lr"):
        trainer.run("command")
    assert [line["step"] for line in read_metrics(config.run_dir / "metrics.jsonl") if line["kind"] == "eval"] == [0]
    assert "NaN" not in (config.run_dir / "metrics.jsonl").read_text()
    assert "NaN" not in (config.run_dir / "summary.json").read_text()


def _rewrite(folder, name, change):
    """Change a checkpoint as a version would have saved it that looked at nothing."""
    path = folder / name
    if name == MODEL_FILE:
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
    else:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][name] = _digest(path)
    (folder / "meta.json").write_text(json.dumps(meta))


def _fill(name, value):
    return lambda weights: weights[name].fill_(value)


def _spoil_moment(state):
    next(iter(state["optimizer"]["state"].values()))["exp_avg"][0] = torch.nan


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (MODEL_FILE, _fill("dec_norm.weight", torch.nan), "the weights of dec_norm.weight are not finite"),
        (MODEL_FILE, _fill("to_logits.weight", 3e38), "the loss of tok_rgb is "),
        (STATE_FILE, _spoil_moment, "is not finite"),
    ],
)
def test_a_spoilt_checkpoint_of_an_older_version_is_skipped(straight, finished, caplog, name, change, said):
    _rewrite(finished.run_dir / "checkpoints" / "step-00000015", name, change)
    assert _run(finished) == 0
    (skipped,) = [message for message in caplog.messages if message.startswith("skipping")]
    assert "step-00000015" in skipped
    assert said in skipped
    assert "had diverged there" in skipped
    assert_same(_weights(finished), _weights(straight), rtol=0, atol=0)
    steps = [line["step"] for line in read_metrics(finished.run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == [*range(1, 21)]


@pytest.mark.parametrize("value", [torch.nan, 3e38])
def test_all_checkpoints_spoilt(straight, finished, caplog, value):
    for step in (5, 10, 15):
        _rewrite(finished.run_dir / "checkpoints" / f"step-{step:08d}", MODEL_FILE, _fill("to_logits.weight", value))
    assert _run(finished) == 0
    assert sum(message.startswith("skipping") for message in caplog.messages) == 3
    assert_same(_weights(finished), _weights(straight), rtol=0, atol=0)


def test_evaluation_and_generation_take_the_checkpoint_before(finished):
    _rewrite(finished.run_dir / "checkpoints" / "step-00000015", MODEL_FILE, _fill("dec_norm.weight", torch.inf))
    assert load_run(finished.run_dir)[1].name == "step-00000010"
