"""Run checkpoints: whole or absent, damaged ones skipped, those of another run refused."""

import dataclasses
import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m4 import checkpoint
from m4.build import build_model
from m4.checkpoint import RunIdentity, check_same_run, load_checkpoint, newest_whole, save_checkpoint
from m4.config import TrainConfig, load_config
from m4.errors import CheckpointError
from m4.training.optimizer import build_optimizer
from m4.training.trainer import Trainer
from tests.runs import environment, write_config

IDENTITY = RunIdentity("abc", 8)


@pytest.fixture
def config(tiny_config) -> TrainConfig:
    return load_config(tiny_config)[0]


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, token_root):
    """A run with checkpoints of steps 1, 2 and 3, and the weights of each."""
    run_dir = tmp_path_factory.mktemp("saved")
    config, _ = load_config(write_config(run_dir / "tiny.yaml", token_root))
    model = build_model(config, torch.device("cpu"))
    optimizer = build_optimizer(model, config)
    weights = {}
    for step in (1, 2, 3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, step)
        optimizer.step()
        _save(run_dir, step, model, optimizer, config)
        weights[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return run_dir, weights


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy of it to break."""
    shutil.copytree(saved_once[0] / "checkpoints", tmp_path / "checkpoints")
    return tmp_path, saved_once[1]


def _save(run_dir, step, model, optimizer, config):
    state = {"optimizer": optimizer.state_dict(), "loop": {"step": step}}
    return save_checkpoint(run_dir, step, model, state, config, IDENTITY)


def _newest_step(run_dir):
    found = newest_whole(run_dir)
    return None if found is None else found[1]["step"]


def test_round_trip(saved, config):
    run_dir, weights = saved
    path, meta = newest_whole(run_dir)
    assert (path.name, meta["step"], meta["data_fingerprint"]) == ("step-00000003", 3, "abc")
    assert {"torch", "python", "numpy", "m4kernels"} <= set(meta["versions"])
    model = build_model(dataclasses.replace(config, seed=5), torch.device("cpu"))
    state = load_checkpoint(path, model)
    assert state["loop"] == {"step": 3}
    assert all(torch.equal(tensor, weights[3][name]) for name, tensor in model.state_dict().items())
    assert state["optimizer"]["state"][0]["step"] == 3


def test_only_the_newest_are_kept(saved, config):
    run_dir, _ = saved
    model = build_model(config, torch.device("cpu"))
    _save(run_dir, 4, model, build_optimizer(model, config), config)
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003", "step-00000004"]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _wrong_format(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("model.safetensors", "state.pt") for damage in (_truncate, _flip, Path.unlink)),
        *(("meta.json", damage) for damage in (_truncate, _wrong_format, Path.unlink)),
    ],
)
def test_damaged_one_is_reported_and_skipped(saved, caplog, name, damage):
    run_dir, _ = saved
    damage(run_dir / "checkpoints" / "step-00000003" / name)
    assert _newest_step(run_dir) == 2
    assert "step-00000003" in caplog.text
    assert name in caplog.text or damage is _wrong_format


@pytest.mark.parametrize("key", ["step", "data_fingerprint", "samples_per_step", "config"])
def test_meta_data_without_a_key_or_of_another_kind(saved, caplog, key):
    path = saved[0] / "checkpoints" / "step-00000003" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {key: None}))
    assert _newest_step(saved[0]) == 2
    assert f"{path}: cannot be read ({key} is a NoneType" in caplog.text
    del meta[key]
    path.write_text(json.dumps(meta))
    assert _newest_step(saved[0]) == 2
    assert f"{path}: cannot be read (it lacks '{key}')" in caplog.text


def test_all_damaged_or_none(saved, tmp_path_factory):
    run_dir, _ = saved
    for step in (1, 2, 3):
        _truncate(run_dir / "checkpoints" / f"step-{step:08d}" / "state.pt")
    assert _newest_step(run_dir) is None
    assert newest_whole(tmp_path_factory.mktemp("empty")) is None


def test_damaged_one_is_replaced_when_the_run_comes_by_again(saved, config):
    run_dir, _ = saved
    _truncate(run_dir / "checkpoints" / "step-00000003" / "model.safetensors")
    model = build_model(config, torch.device("cpu"))
    _save(run_dir, 3, model, build_optimizer(model, config), config)
    assert _newest_step(run_dir) == 3


def test_stale_temporaries_are_cleaned(saved, config):
    run_dir, _ = saved
    for name in (".tmp-00000004-1", ".tmp-old-step-00000001"):
        shutil.copytree(run_dir / "checkpoints" / "step-00000001", run_dir / "checkpoints" / name)
    assert _newest_step(run_dir) == 3
    checkpoint.clean_temporaries(run_dir)
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    assert _newest_step(run_dir) == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["weight_decay=0.001"], ["weight_decay is 0.05", "0.001"]),
        (["model.dim=32"], ["model.dim is 16", "32"]),
        (["seed=1"], ["seed is 0", "1"]),
        (["modalities=[a,b,c,d]"], ["modalities", "tok_rgb", "'a'"]),
        (["model.dim=32", "seed=1", "lr=0.001"], ["(and 1 more: seed)", "model.dim"]),
    ],
)
def test_checkpoint_of_another_config(saved, tiny_config, overrides, said):
    path, meta = newest_whole(saved[0])
    other, _ = load_config(tiny_config, overrides)
    with pytest.raises(CheckpointError) as caught:
        check_same_run(path, meta, other, IDENTITY)
    for part in (*said, str(path), "run_name"):
        assert part in str(caught.value)


def test_checkpoint_of_other_data_or_batch(saved, config):
    path, meta = newest_whole(saved[0])
    with pytest.raises(CheckpointError, match="data fingerprint is 'abc' there and 'xyz' now"):
        check_same_run(path, meta, config, RunIdentity("xyz", 8))
    with pytest.raises(CheckpointError, match=r"samples a step.* is 8 there and 12 now"):
        check_same_run(path, meta, config, RunIdentity("abc", 12))


@pytest.mark.parametrize("override", ["kernels=reference", "eval_freq=9", "log.every=7", "run_name=x", "batch_size=8"])
def test_what_may_change(saved, tiny_config, override):
    path, meta = newest_whole(saved[0])
    other, _ = load_config(tiny_config, [override])
    check_same_run(path, meta, other, IDENTITY)


@pytest.mark.parametrize(("key", "was", "now"), [("coords_lr_scale", "None", "0.5"), ("vocab_eps", "1e-08", "0.001")])
def test_a_checkpoint_from_before_a_key(saved, tiny_config, key, was, now):
    """It had what the key's default says: refused under another."""
    path, meta = newest_whole(saved[0])
    del meta["config"][key]
    assert check_same_run(path, meta, load_config(tiny_config)[0], IDENTITY) == []
    with pytest.raises(CheckpointError, match=f"{key} is {was} there and {now} now; set it back to resume"):
        check_same_run(path, meta, load_config(tiny_config, [f"{key}={now}"])[0], IDENTITY)


def test_a_checkpoint_from_before_the_order_had_a_name(saved, tiny_config):
    """It was trained in the sorted order: refused under another, which would show it some samples twice."""
    path, meta = newest_whole(saved[0])
    del meta["config"]["data"]["order"]
    with pytest.raises(CheckpointError, match=r"data.order is 'sorted' there and 'feistel' now; set it back to resume"):
        check_same_run(path, meta, load_config(tiny_config)[0], IDENTITY)
    same, _ = load_config(tiny_config, ["data.order=sorted"])
    assert check_same_run(path, meta, same, IDENTITY) == []
    order = Trainer(same, device=torch.device("cpu")).batches._order
    assert order.kind == "sorted"


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_no_room(saved, tiny_config, limit):
    """Writing stops in the weights or in the optimiser state, as on a full disk, through a file size limit."""
    run_dir, _ = saved
    script = f"""
import resource, torch
from pathlib import Path
from tests.test_checkpoint import _save
from m4.build import build_model
from m4.config import load_config
from m4.training.optimizer import build_optimizer
config, _ = load_config({str(tiny_config)!r}, ["keep_ckpts=1"])
model = build_model(config, torch.device("cpu"))
optimizer = build_optimizer(model, config)
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    _save(Path({str(run_dir)!r}), 4, model, optimizer, config)
except ValueError as error:
    print(type(error).__name__, error)
"""
    sizes = {name: (run_dir / "checkpoints/step-00000003" / name).stat().st_size for name in
             ("model.safetensors", "state.pt")}  # fmt: skip
    assert limit < max(sizes.values()), sizes
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert "CheckpointError" in done.stdout, done.stdout + done.stderr
    assert "cannot be written" in done.stdout
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (1, 2, 3)]
    assert _newest_step(run_dir) == 3


@pytest.mark.parametrize("limit", [0, 500, 5_000, 30_000])
def test_a_failed_write_of_the_state_is_an_error_of_the_disk(tmp_path, limit):
    """torch says "unexpected pos …" for some of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint._save_state({"a": torch.ones(1000), "b": torch.ones(9000)}, tmp_path / "state.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_names_the_disk(saved, config, monkeypatch):
    run_dir, _ = saved

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = build_model(config, torch.device("cpu"))
    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*are free.*make room"):
        _save(run_dir, 4, model, build_optimizer(model, config), config)
    assert _newest_step(run_dir) == 3


def test_other_errors_are_not_taken_for_a_full_disk(saved, config):
    run_dir, _ = saved
    model = build_model(config, torch.device("cpu"))
    with pytest.raises(AttributeError):
        _save(run_dir, 4, model, None, config)
