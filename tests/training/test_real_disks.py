"""Disks as they are: a small tmpfs that fills up, one that is read-only; and a checkpoint that lost its end on one."""

import dataclasses
import logging
import subprocess

import pytest
from safetensors.torch import load_file

from m4.checkpoint import newest_whole, step_folders
from m4.errors import ConfigError, DataError
from m4.run.metrics import read_metrics
from m4.training.trainer import Trainer
from tests.training.step_setup import assert_same

STEP = 0.008
SIZE = 1 << 20  # bytes; a checkpoint has some 150,000


def _mount(folder, *options):
    """Returns why not."""
    typed = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    try:
        done = subprocess.run(typed, capture_output=True, text=True, timeout=20)
    except OSError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a tmpfs with these options, and gives its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(*options):
        why_not = _mount(folder, *options)
        if why_not:
            pytest.skip(f"a tmpfs cannot be mounted here: {why_not}")
        mounted.append(folder)
        return folder

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)


@pytest.fixture(params=[True, False], ids=["background", "at once"])
def config(tiny_train_config, caplog, request):
    caplog.set_level(logging.INFO, logger="m4")
    return dataclasses.replace(
        tiny_train_config, total_tokens=8 * STEP, token_warmup=STEP, eval_freq=100, save_ckpt_freq=2 * STEP,
        eval_samples=1, eval_generate_samples=0, async_checkpoints=request.param, keep_ckpts=2, keep_best=0,
    )  # fmt: skip


@pytest.fixture
def usual(config):
    """Weights and record of the same run on a disk with room."""
    usual = dataclasses.replace(config, run_name="usual")
    assert Trainer(usual).run("command") == 0
    return _outcome(usual)


def _outcome(config):
    lines = [line for line in read_metrics(config.run_dir / "metrics.jsonl") if line["kind"] == "train"]
    weights = load_file(newest_whole(config.run_dir)[0] / "model.safetensors")
    return weights, [(line["step"], line["loss"]) for line in lines]


def _fill(folder):
    """Leave no byte free; returns the file that takes them."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return filler


def _on_step(trainer, acts):
    """Call ``acts[step]`` once the saves before it are on the disk, or are not."""
    take_step = trainer.train_step

    def step():
        figures = take_step()
        if trainer.state.step in acts:
            trainer.saver.settle()
            acts[trainer.state.step]()
        return figures

    trainer.train_step = step
    return trainer


def test_a_disk_that_is_full_for_a_while(config, disk, usual, caplog):
    """The save that meets it fails and is said; lines of the record wait; then both go on, and nothing is missing."""
    small = disk(f"size={SIZE}")
    config = dataclasses.replace(config, output_dir=str(small), run_name="run")
    acts = {3: lambda: _fill(small), 5: lambda: (small / "filler").unlink()}
    assert _on_step(Trainer(config), acts).run("command") == 0
    (said,) = [message for message in caplog.messages if message.startswith("NOT SAVED")]
    assert said.startswith("NOT SAVED after step 4: ")
    assert "No space left on device" in said
    assert "lines wait in memory" in caplog.text
    assert [path.name[-1] for path in step_folders(config.run_dir)] == ["6", "8"]
    assert not list((config.run_dir / "checkpoints").glob(".tmp-*"))
    weights, losses = _outcome(config)
    assert_same(weights, usual[0], rtol=0, atol=0)
    assert losses == usual[1]


def test_a_disk_that_stays_full_and_then_has_room(config, disk, usual):
    """The run ends with the error of its last save; the earlier checkpoint is whole, and it goes on from there."""
    small = disk(f"size={SIZE}")
    config = dataclasses.replace(config, output_dir=str(small), run_name="run")
    with pytest.raises((ValueError, OSError), match="No space left on device"):
        _on_step(Trainer(config), {3: lambda: _fill(small)}).run("command")
    assert newest_whole(config.run_dir)[1]["step"] == 2
    (small / "filler").unlink()
    assert Trainer(config).run("command") == 0
    weights, losses = _outcome(config)
    assert_same(weights, usual[0], rtol=0, atol=0)
    assert losses == usual[1]


def test_a_disk_without_room_for_one_checkpoint_is_said_before_any_work(config, disk, monkeypatch):
    small = disk("size=64k")
    monkeypatch.setattr(Trainer, "loop", lambda _: pytest.fail("training"))
    with pytest.raises(ConfigError, match=r"disk/run: 0\.00 GB are free there and a checkpoint takes"):
        Trainer(dataclasses.replace(config, output_dir=str(small), run_name="run")).run("command")


def test_a_read_only_disk_is_named_before_any_work(config, disk, monkeypatch):
    """Root cannot write to it either."""
    folder = disk(f"size={SIZE}", "ro")
    monkeypatch.setattr(Trainer, "loop", lambda _: pytest.fail("training"))
    with pytest.raises(DataError, match=r"disk/run: expected a folder that can be written to.*Read-only file system"):
        Trainer(dataclasses.replace(config, output_dir=str(folder), run_name="run")).run("command")


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
def test_a_checkpoint_that_lost_its_end_is_left_for_the_one_before(config, usual, caplog, name):
    """As a disk leaves it that lies about having written: said, and the same bits in the end."""
    assert Trainer(dataclasses.replace(config, stop_after_steps=6)).run("command") == 0
    newest = step_folders(config.run_dir)[-1]
    assert newest.name[-1] == "6"
    with (newest / name).open("r+b") as file:
        file.truncate((newest / name).stat().st_size // 2)
    caplog.clear()
    assert Trainer(config).run("command") == 0
    assert "skipping a damaged checkpoint" in caplog.text
    assert "resuming from" in caplog.text
    weights, losses = _outcome(config)
    assert_same(weights, usual[0], rtol=0, atol=0)
    assert losses == usual[1]
