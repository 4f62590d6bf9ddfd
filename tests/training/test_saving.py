"""Checkpoints that a thread writes: of the step that they are of, one at a time, with nothing lost or kept quiet."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from m4.checkpoint import newest_whole, read_checkpoint, save_checkpoint, step_folders
from m4.config import load_config
from m4.training import saving
from m4.training.saving import HostCopy
from m4.training.trainer import Trainer
from tests.ranks import wait_for
from tests.runs import REPOSITORY, environment
from tests.training.step_setup import assert_same

STEP = 0.008
SECONDS = 60


@pytest.fixture
def config(tiny_train_config, caplog):
    caplog.set_level(logging.INFO, logger="m4")
    return dataclasses.replace(
        tiny_train_config, total_tokens=6 * STEP, token_warmup=STEP, eval_freq=100, save_ckpt_freq=2 * STEP,
        eval_samples=1, eval_generate_samples=0, ema=0.9, keep_ckpts=9,
    )  # fmt: skip


class Gate:
    """Holds up the writing of checkpoints, by step, in whatever thread it is."""

    def __init__(self, monkeypatch, *held):
        self.held = {step: threading.Event() for step in held}
        self.begun, self.ended = [], []
        monkeypatch.setattr(saving, "save_checkpoint", self.write)

    def write(self, run_dir, step, *arguments):
        self.begun.append(step)
        if step in self.held:
            assert self.held[step].wait(SECONDS)
        path = save_checkpoint(run_dir, step, *arguments)
        self.ended.append(step)
        return path


def _on_step(trainer, act):
    """Call ``act(step)`` after every step."""
    take_step = trainer.train_step

    def step():
        figures = take_step()
        act(trainer.state.step)
        return figures

    trainer.train_step = step
    return trainer


def _contents(path):
    saved = read_checkpoint(path)
    moments = {
        f"{i}.{key}": value for i, one in saved.state["optimizer"]["state"].items() for key, value in one.items()
    }
    loop = {key: value for key, value in saved.state["loop"].items() if key != "seconds"}
    averaged, loss = saved.averaged or {}, saved.meta["evaluation_loss"]
    return saved.weights, averaged, moments, loop, saved.state["random"], loss


def test_training_goes_on_while_a_checkpoint_is_written_as_it_was(config, monkeypatch):
    """Two steps on, what is written of step 2 is still step 2, bit for bit, and all of it."""
    at_once = dataclasses.replace(config, run_name="at-once", async_checkpoints=False)
    assert Trainer(at_once).run("command") == 0
    gate, seen = Gate(monkeypatch, 2), []

    def act(step):
        if step == 4:  # its save will wait for that of step 2
            seen.append((gate.begun, gate.ended))
            assert (gate.begun, gate.ended) == ([2], [])
            gate.held[2].set()

    assert _on_step(Trainer(config), act).run("command") == 0
    assert len(seen) == 1
    assert gate.begun == gate.ended == [2, 4, 6]
    for one, other in zip(step_folders(config.run_dir), step_folders(at_once.run_dir), strict=True):
        found, expected = _contents(one), _contents(other)
        for a, b in zip(found[:3], expected[:3], strict=True):
            assert_same(a, b, rtol=0, atol=0)
        assert found[3] == expected[3]
        assert torch.equal(found[4]["cpu"], expected[4]["cpu"])
        assert found[5] == expected[5]


def test_a_failure_is_said_at_once_and_the_next_save_tries(config, monkeypatch, caplog):
    """In the log while training goes on; the checkpoint of the next save is whole."""
    gate, seen = Gate(monkeypatch), []
    write = gate.write

    def full(run_dir, step, *arguments):
        if step == 2:
            raise OSError(28, "No space left on device", "state.pt")
        return write(run_dir, step, *arguments)

    monkeypatch.setattr(saving, "save_checkpoint", full)

    def act(step):
        if step == 3:
            wait_for(lambda: "NOT SAVED after step 2: " in caplog.text)
            assert "the next save is tried after step 4" in caplog.text
            seen.append(step)

    assert _on_step(Trainer(config), act).run("command") == 0
    assert (seen, gate.ended) == ([3], [4, 6])
    assert caplog.text.count("NOT SAVED") == 1


def test_a_failure_that_a_stop_signal_meets_is_tried_again(config, monkeypatch, caplog):
    """The signal comes in the very step whose save fails: it is not taken for saved."""
    gate = Gate(monkeypatch, 2)
    write, tries = gate.write, []

    def full_once(run_dir, step, *arguments):
        tries.append(step)
        if len(tries) == 1:
            raise OSError(28, "No space left on device", "state.pt")
        return write(run_dir, step, *arguments)

    monkeypatch.setattr(saving, "save_checkpoint", full_once)
    gate.held[2].set()
    trainer = Trainer(config)
    save = trainer.save

    def save_and_signal(**keywords):
        save(**keywords)
        if trainer.stop.received is None and trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.save = save_and_signal
    assert trainer.run("command") == 143
    assert tries == [2, 2]
    assert newest_whole(config.run_dir)[1]["step"] == 2


def test_a_stop_signal_waits_for_what_is_being_written(config, monkeypatch):
    gate = Gate(monkeypatch, 2)

    def act(step):
        if step == 3:
            threading.Timer(0.2, gate.held[2].set).start()
            os.kill(os.getpid(), signal.SIGTERM)

    assert _on_step(Trainer(config), act).run("command") == 143
    assert gate.ended == [2, 3]
    assert [path.name[-1] for path in step_folders(config.run_dir)] == ["2", "3"]


def test_what_is_no_fault_of_the_disk_ends_the_run(config, monkeypatch, caplog):
    """At the next save, with its own traceback; it is in the log before."""

    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(saving, "save_checkpoint", broken)
    trainer = Trainer(config)
    with pytest.raises(TypeError, match="a bug"):
        trainer.run("command")
    assert trainer.state.step == 4
    assert "NOT SAVED after step 2: a bug" in caplog.text


def test_a_run_that_diverges_names_the_checkpoint_that_was_being_written(config, monkeypatch):
    gate = Gate(monkeypatch, 2)
    trainer = Trainer(config)

    def act(step):
        if step == 3:
            threading.Timer(0.3, gate.held[2].set).start()
            with torch.no_grad():
                trainer.model.dec_norm.weight.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"step 4: .*the newest checkpoint is .*step-00000002\. Give"):
        _on_step(trainer, act).run("command")
    assert gate.ended == [2]


def test_an_error_of_training_leaves_what_was_being_written_whole(config, monkeypatch):
    gate = Gate(monkeypatch, 2)

    def act(step):
        if step == 3:
            threading.Timer(0.2, gate.held[2].set).start()
            raise RuntimeError("of training")

    with pytest.raises(RuntimeError, match="of training"):
        _on_step(Trainer(config), act).run("command")
    assert newest_whole(config.run_dir)[1]["step"] == 2


def test_without_memory_for_a_copy_it_is_written_at_once(config, monkeypatch, caplog):
    def none_left(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(HostCopy, "__call__", none_left)
    assert Trainer(config).run("command") == 0
    assert [path.name[-1] for path in step_folders(config.run_dir)] == ["2", "4", "6"]
    assert caplog.text.count("async_checkpoints: no memory for a copy") == 2


def test_copies_share_nothing_and_use_the_same_memory_again(config):
    trainer = Trainer(config)
    trainer.train_step()
    contents, copy = trainer.trained.contents(), HostCopy()

    def tensors(tree):
        if isinstance(tree, torch.Tensor):
            return [tree]
        inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else []
        return [tensor for value in inside for tensor in tensors(value)]

    def of(some):
        return tensors((some.model.state_dict(), some.state, some.averaged.state_dict()))

    first, second = of(contents.copied(copy)), of(contents.copied(copy))
    places = [tensor.data_ptr() for tensor in first]
    assert places == [tensor.data_ptr() for tensor in second]
    assert set(places).isdisjoint(tensor.data_ptr() for tensor in of(contents))
    assert all(torch.equal(a, b) for a, b in zip(first, of(contents), strict=True))
    assert copy.bytes() == sum(tensor.numel() * tensor.element_size() for tensor in first)


_SLOW = """
import sys, time, m4.checkpoint
from m4.config import load_config
from m4.training.trainer import Trainer
flush = m4.checkpoint._flush
def slow(path):
    print("writing", flush=True)
    time.sleep(60)
m4.checkpoint._flush = slow
sys.exit(Trainer(load_config(sys.argv[1], sys.argv[2:])[0]).run("command"))
"""


def test_a_second_ctrl_c_leaves_a_checkpoint_half_written_and_the_run_whole(tiny_config):
    keys = ["total_tokens=0.048", "save_ckpt_freq=0.008", "eval_freq=100", "eval_samples=1", "eval_generate_samples=0"]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, tiny_config, *keys], cwd=REPOSITORY, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGINT)
        threading.Timer(1.0, process.send_signal, [signal.SIGINT]).start()
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, said
    assert "leaving at once" in said
    config, _ = load_config(tiny_config, keys)
    assert list((config.run_dir / "checkpoints").glob(".tmp-*"))
    assert step_folders(config.run_dir) == []
    assert Trainer(config).run("command") == 0
    assert not list((config.run_dir / "checkpoints").glob(".tmp-*"))
    usual = dataclasses.replace(config, run_name="usual")
    assert Trainer(usual).run("command") == 0
    weights = [load_file(newest_whole(c.run_dir)[0] / "model.safetensors") for c in (config, usual)]
    assert_same(*weights, rtol=0, atol=0)
    assert json.loads((config.run_dir / "summary.json").read_text())["finished"]
