"""The trainer through its command line: runs, resumes bit for bit, stops cleanly, and says what is wrong."""

import json
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from m4.checkpoint import newest_whole
from m4.config import load_config
from m4.run.directory import only_process
from m4.run.metrics import read_metrics
from m4.training.trainer import Trainer
from tests.runs import REPOSITORY, command, environment, run_command_line


def _train(config, *overrides):
    return run_command_line("m4.train", "--config", config, *overrides, cwd=REPOSITORY)


def _start(config, *overrides):
    return subprocess.Popen(
        command("m4.train", "--config", config, *overrides),
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _weights(run_dir):
    path, meta = newest_whole(run_dir)
    return meta["step"], load_file(path / "model.safetensors")


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, token_root):
    """Twenty steps without interruption."""
    from tests.runs import write_config

    config = write_config(tmp_path_factory.mktemp("straight") / "tiny.yaml", token_root)
    done = _train(config, "log.tensorboard=true")
    assert done.returncode == 0, done.stderr
    return config.parent / "runs" / "tiny", done.stderr


def test_run_directory(straight):
    run_dir, said = straight
    config, _ = load_config(run_dir / "config.yaml")
    assert (config.run_name, config.model.dim) == ("tiny", 16)
    assert any(run_dir.glob("events.out.tfevents.*"))
    lines = read_metrics(run_dir / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 21))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 5, 10, 15, 20]
    assert train[-1]["lr"] == pytest.approx(1e-7)
    assert train[4]["lr"] == pytest.approx(0.002)
    assert train[-1]["tokens"] == pytest.approx(0.16)
    assert 4.1589 < train[0]["loss"] < 12  # above log 64: an untrained model copies, and these tokens are random
    assert 0 < train[0]["padding_avoided"] < 1
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["finished"]
    assert summary["evaluation"]["loss"] < summary["first_evaluation"]["loss"]
    assert summary["training_time_seconds"] == 52485
    assert summary["speedup_over_training_time"] == pytest.approx(52485 / summary["whole_recipe_seconds"])
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000015", "step-00000020"]
    for words in ("4 samples x 2 accumulated = 8 samples a step", "smoke test passed", "whole recipe", "samples/s",
                  "valid tok/s", "counted tok/s", "padding avoided", "memory", "left", "14:34:45"):  # fmt: skip
        assert words in said


def test_ten_and_ten_steps_are_twenty(straight, tiny_config):
    done = _train(tiny_config, "stop_after_steps=10")
    assert done.returncode == 0, done.stderr
    run_dir = tiny_config.parent / "runs" / "tiny"
    assert _weights(run_dir)[0] == 10
    with (run_dir / "metrics.jsonl").open("a") as file:  # what a killed run would have written after its checkpoint
        file.write('{"kind": "train", "step": 11, "loss": 0}\n{"kind": "train", "st')
    done = _train(tiny_config)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    step, weights = _weights(run_dir)
    assert step == 20
    assert _same(weights, _weights(straight[0])[1])
    resumed, whole = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, straight[0]))
    for key in ("kind", "step", "loss", "lr", "grad_norm", "per_modality"):
        assert [line.get(key) for line in resumed] == [line.get(key) for line in whole]
    again = _train(tiny_config)
    assert again.returncode == 0
    assert "complete" in again.stderr


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_stop_signal_saves_the_last_finished_step(straight, tiny_config, signum, status):
    process = _start(tiny_config, "save_ckpt_freq=100")
    run_dir = tiny_config.parent / "runs" / "tiny"
    _wait_for(lambda: (run_dir / "metrics.jsonl").exists() and "train" in (run_dir / "metrics.jsonl").read_text())
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "Traceback" not in said
    assert f"python -m m4.train --config {tiny_config} save_ckpt_freq=100" in said
    step, _ = _weights(run_dir)
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] <= step
    assert not json.loads((run_dir / "summary.json").read_text())["finished"]
    if signum != signal.SIGINT:
        return  # what it resumes to is the same as after SIGINT
    done = _train(tiny_config, "save_ckpt_freq=100")
    assert done.returncode == 0, done.stderr
    assert _same(_weights(run_dir)[1], _weights(straight[0])[1])


def _wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_kill_at_random_instants(straight, tiny_config):
    """Saving after every step and killed again and again: the run still ends where the straight one does."""
    random.seed(0)
    run_dir = tiny_config.parent / "runs" / "tiny"
    every_step = ("save_ckpt_freq=0.008", "keep_ckpts=2", "eval_freq=100")
    for _ in range(4):
        before = newest_whole(run_dir)[1]["step"] if run_dir.exists() and newest_whole(run_dir) else -1
        process = _start(tiny_config, *every_step)
        folder = run_dir / "checkpoints"
        _wait_for(lambda: any(p.name > f"step-{before + 1:08d}" for p in folder.glob("step-*")) or process.poll() == 0)  # noqa: B023
        time.sleep(random.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert newest_whole(run_dir) is not None
    done = _train(tiny_config, *every_step)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    step, weights = _weights(run_dir)
    assert step == 20
    assert _same(weights, _weights(straight[0])[1])


def test_damaged_newest_checkpoint_costs_only_its_steps(straight, tiny_config):
    run_dir = tiny_config.parent / "runs" / "tiny"
    shutil.copytree(straight[0], run_dir)
    weights = run_dir / "checkpoints" / "step-00000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    done = _train(tiny_config)
    assert done.returncode == 0, done.stderr
    assert f"damaged checkpoint: {weights}" in done.stderr
    assert f"resuming from {run_dir / 'checkpoints' / 'step-00000015'}" in done.stderr
    assert _same(_weights(run_dir)[1], _weights(straight[0])[1])
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"] == [
        *range(1, 21)
    ]


@pytest.mark.parametrize(
    ("config", "override", "said"),
    [
        ("tiny", "data.root=/nowhere", ["data.root", "/nowhere", "m4.data prepare"]),
        ("tiny", "device=cuda:77", ["device", "cuda:77"]),
        ("tiny", "log.wandb=true", ["wandb", "pip install"]),
        ("tiny", "model.attention={decoder: sideways}", ["attention.decoder", "sideways"]),
        ("tiny", "data.eval_split=evaluation", ["evaluation"]),
        ("straight", "weight_decay=0.5", ["weight_decay is 0.05 there and 0.5 now", "run_name"]),
    ],
)
def test_what_cannot_run_says_why(straight, tiny_config, config, override, said):
    path = tiny_config if config == "tiny" else straight[0] / "config.yaml"
    with pytest.raises(ValueError, match=re.escape(said[0])) as caught:
        Trainer(load_config(path, [override])[0]).run("command")
    for part in said:
        assert part in str(caught.value)


def test_run_directory_that_cannot_be_written(tiny_config):
    (tiny_config.parent / "runs").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"runs.*folder that can be written"):
        Trainer(load_config(tiny_config)[0]).run("command")


def test_two_trainers_in_one_run_directory(tiny_config):
    config, _ = load_config(tiny_config)
    with only_process(config.run_dir), pytest.raises(ValueError, match="another process"):
        Trainer(config).run("command")


def test_a_mistake_is_one_line_and_status_2(tiny_config):
    for arguments, said in (
        ((tiny_config, "learning_rate=1"), "unknown key"),
        ((tiny_config.parent / "no.yaml",), "no.yaml"),
    ):
        done = _train(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_token_above_its_vocabulary_stops_the_smoke_test_or_the_store(tiny_config):
    done = _train(tiny_config, "vocab_sizes=[64,64,64,20]")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "coords_next" in last
    assert "20" in last
    assert "Traceback" not in done.stderr


def test_many_processes_need_the_launcher(tiny_config):
    done = subprocess.run(
        command("m4.train", "--config", tiny_config),
        cwd=REPOSITORY,
        env={**environment(), "WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert re.match(
        r"error: rank 0 did not meet all 2 ranks .*MASTER_ADDR.*start the command with torchrun", done.stderr
    )
