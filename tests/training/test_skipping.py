"""Steps that are not finite: skipped up to a number, counted and written down, then the run stops."""

import dataclasses
import json
import logging

import pytest
import torch
from safetensors.torch import load_file

import m4.training.trainer
from m4.checkpoint import newest_whole
from m4.run.metrics import read_metrics
from m4.training.finite import NON_FINITE_FILE
from m4.training.guard import Guard
from m4.training.trainer import Trainer
from tests.training.step_setup import AS_ON_A_GPU, PlainRecorder, Steps, assert_same

STEP = 0.008


@pytest.fixture
def config(tiny_train_config, caplog):
    caplog.set_level(logging.INFO, logger="m4")
    return dataclasses.replace(
        tiny_train_config, total_tokens=8 * STEP, token_warmup=STEP, eval_freq=100, save_ckpt_freq=100, eval_samples=1,
        eval_generate_samples=0,
    )  # fmt: skip


def _spoil(trainer, steps):
    """Make the gradient of these steps infinite."""
    trainer.model.dec_norm.weight.register_hook(
        lambda gradient: gradient * torch.inf if trainer.state.step + 1 in steps else gradient
    )
    return trainer


def _lines(config):
    return [line for line in read_metrics(config.run_dir / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize("late", [False, True])
def test_skipped_steps_are_counted_and_written_down(config, monkeypatch, caplog, late):
    if late:  # figures are read at log points only
        monkeypatch.setattr(m4.training.trainer.Execution, "of", lambda *_: AS_ON_A_GPU)
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, every=4))
    config = dataclasses.replace(config, skip_non_finite=2)
    trainer = _spoil(Trainer(config), {3, 6})
    assert trainer.run("command") == 0
    said = [message for message in caplog.messages if "its update is skipped" in message]
    assert [message[:7] for message in said] == ["step 3:", "step 6:"]
    assert "(2 of at most 2 in this run)" in said[1]
    lines = {line["step"]: line for line in _lines(config)}
    if not late:
        assert [lines[step]["skipped_steps"] for step in range(1, 9)] == [0, 0, 1, 1, 1, 2, 2, 2]
        assert lines[3]["grad_norm"] is None
        assert lines[3]["loss"] > 0  # the loss was finite
    assert lines[8]["skipped_steps"] == 2
    noted = [json.loads(line) for line in (config.run_dir / NON_FINITE_FILE).read_text().splitlines()]
    assert [line["step"] for line in noted] == [3, 6]
    assert noted[0]["sample_ids"] == list(range(16, 24))
    assert noted[0]["rows"] == trainer.order.rows(torch.arange(16, 24).numpy()).tolist()
    assert noted[0]["pids"] == [f"{row:06d}" for row in noted[0]["rows"]]
    assert "gradient norm" in noted[0]["reason"]
    # AdamW counts its own steps: six of eight.
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {6}


def test_one_too_many_stops_and_a_resumed_run_remembers(config):
    config = dataclasses.replace(config, skip_non_finite=1)
    assert _spoil(Trainer(dataclasses.replace(config, stop_after_steps=4)), {3}).run("command") == 0
    with pytest.raises(ValueError, match=r"step 6: .* 1 skipped steps; .*non_finite.jsonl.*step-00000004") as said:
        _spoil(Trainer(config), {6}).run("command")
    assert "skip_non_finite=11" in str(said.value)
    noted = [json.loads(line)["step"] for line in (config.run_dir / NON_FINITE_FILE).read_text().splitlines()]
    assert noted == [3, 6]
    assert newest_whole(config.run_dir)[1]["step"] == 4
    more = dataclasses.replace(config, skip_non_finite=2)
    assert _spoil(Trainer(more), {6}).run("command") == 0
    assert [line["skipped_steps"] for line in _lines(more)] == [0, 0, 1, 1, 1, 2, 2, 2]
    # The same bits as without an interruption.
    straight = dataclasses.replace(more, run_name="straight")
    assert _spoil(Trainer(straight), {3, 6}).run("command") == 0
    weights = [load_file(newest_whole(c.run_dir)[0] / "model.safetensors") for c in (more, straight)]
    assert_same(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_skipped_step_changes_nothing_and_the_next_goes_on(config, recorded):
    setup = Steps(dataclasses.replace(config, skip_non_finite=1))
    if recorded:
        setup.record(PlainRecorder())
    setup.run(2)
    before = setup.weights()
    healthy = setup.model.dec_norm.weight.detach().clone()
    with torch.no_grad():
        setup.model.dec_norm.weight[0] = torch.nan
    setup.launch()
    with torch.no_grad():
        setup.model.dec_norm.weight.copy_(healthy)
    assert_same(before, setup.weights(), rtol=0, atol=0)
    setup.launch()
    figures = setup.step.read()
    assert (figures.finite, figures.updates, figures.lost) == (True, 1, 0)
    (skipped,) = figures.skipped
    assert skipped.ago == 1
    assert not all(torch.isfinite(torch.tensor(skipped.losses)))
    assert not torch.equal(before["to_logits.weight"], setup.weights()["to_logits.weight"])


def test_the_guard_by_itself():
    """Random sequences of finite and other steps, read at random: what the host hears is what happened."""
    random = torch.Generator().manual_seed(0)
    for allowed in (0, 1, 3):
        for _ in range(20):
            bad = (torch.rand(12, generator=random) < 0.3).tolist()
            reads = (torch.rand(12, generator=random) < 0.4).tolist()
            guard = Guard(2, allowed, torch.device("cpu"))
            updates, skipped, stopped = 0, [], None
            for step, (is_bad, read) in enumerate(zip(bad, reads, strict=True)):
                losses = torch.tensor([float(step), torch.nan if is_bad else 1.0])
                guard.check(losses, torch.tensor(2.0))
                over = sum(bad[: step + 1]) > allowed
                assert bool(guard.found_inf) == (is_bad or over)
                if read or step == 11:
                    verdict = guard.read(guard.figures().tolist())
                    updates += verdict.updates
                    skipped += [step - one.ago for one in verdict.skipped]
                    if verdict.stopped is not None:
                        stopped = step - verdict.stopped.ago
                        assert verdict.stopped.losses[0] == stopped
                        break
            places = [step for step in range(12) if bad[step]]
            assert skipped == places[:allowed]
            assert stopped == (places[allowed] if len(places) > allowed else None)
            assert updates == sum(not b for b in bad[: 12 if stopped is None else stopped])
