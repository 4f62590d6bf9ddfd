"""Where a run starts: its own checkpoints, one that is named, weights that are given; and which checkpoints stay."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m4.build import build_model
from m4.checkpoint import (
    META_FILE,
    MODEL_FILE,
    RunIdentity,
    best_checkpoint,
    newest_whole,
    read_checkpoint,
    save_checkpoint,
    step_folders,
)
from m4.run.metrics import read_metrics
from m4.saved_run import SavedRun
from m4.training.start import load_initial_weights, starting_points
from m4.training.trainer import Trainer
from tests.training.step_setup import assert_same

CPU = torch.device("cpu")
STEP = 0.008  # millions of counted tokens


def _run(config, **changes):
    config = dataclasses.replace(config, **changes)
    assert Trainer(config).run("command") == 0
    return config


def _weights(config):
    return load_file(newest_whole(config.run_dir)[0] / MODEL_FILE)


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level("INFO", logger="m4")


@pytest.fixture
def config(tiny_train_config):
    """Six steps, saved and evaluated at every second."""
    return dataclasses.replace(
        tiny_train_config, total_tokens=6 * STEP, token_warmup=STEP, eval_freq=2 * STEP, save_ckpt_freq=2 * STEP
    )


@pytest.fixture
def straight(config):
    return _run(config, run_name="straight", keep_ckpts=9)


def test_a_named_checkpoint_goes_on_in_a_folder_of_its_own(straight, config, caplog):
    named = straight.run_dir / "checkpoints" / "step-00000002"
    branch = _run(config, run_name="branch", resume=str(named), stop_after_steps=4)
    assert [path.name for path in step_folders(branch.run_dir)] == ["step-00000004"]
    # The same command resumes the branch from its own checkpoint.
    caplog.clear()
    branch = _run(config, run_name="branch", resume=str(named))
    assert f"resuming from {branch.run_dir / 'checkpoints' / 'step-00000004'}" in caplog.text
    assert_same(_weights(branch), _weights(straight), rtol=0, atol=0)
    lines = [line for line in read_metrics(branch.run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    # A run directory is its newest checkpoint; the run is complete there.
    assert next(starting_points(dataclasses.replace(config, resume=str(straight.run_dir)))).meta["step"] == 6


def test_never_refuses_a_folder_with_checkpoints(straight, config):
    with pytest.raises(ValueError, match=r"resume: never, but .*straight holds checkpoints, the newest step-00000006"):
        Trainer(dataclasses.replace(straight, resume="never")).run("command")
    assert len(step_folders(straight.run_dir)) == 3
    _run(config, run_name="new", resume="never", stop_after_steps=1)


def test_an_own_checkpoint_has_to_be_the_newest(straight):
    older = straight.run_dir / "checkpoints" / "step-00000002"
    with pytest.raises(ValueError, match=r"resume: .*step-00000002 is not the newest .* step-00000006; add run_name"):
        Trainer(dataclasses.replace(straight, resume=str(older))).run("command")
    _run(straight, resume=str(older.with_name("step-00000006")))


def test_a_named_checkpoint_is_whole_and_of_the_same_run_or_an_error(straight, config, tmp_path):
    def refused(**changes):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            Trainer(dataclasses.replace(config, run_name="branch", **changes)).run("command")
        return str(caught.value)

    assert "resume: expected auto, never, a checkpoint folder or a run" in refused(resume=str(tmp_path / "nowhere"))
    assert "holds no whole one" in refused(resume=str(tmp_path))
    named = straight.run_dir / "checkpoints" / "step-00000004"
    assert "seed is 0 there and 3 now" in refused(resume=str(named), seed=3)
    (named / MODEL_FILE).write_bytes((named / MODEL_FILE).read_bytes()[:-8])
    assert refused(resume=str(named)).startswith(f"resume: {named / MODEL_FILE}: expected")
    with pytest.raises(ValueError, match="init_from: expected null with resume=PATH"):
        dataclasses.replace(config, resume=str(named), init_from=str(named))


def test_initial_weights_of_a_run_a_checkpoint_and_a_file(straight, config, tmp_path):
    folder = straight.run_dir / "checkpoints" / "step-00000004"
    file = tmp_path / "weights.pth"
    torch.save({"model": load_file(folder / MODEL_FILE)}, file)
    for source, step in ((straight.run_dir, 6), (folder, 4), (file, 4), (folder / MODEL_FILE, 4)):
        model = build_model(dataclasses.replace(config, seed=9), CPU)
        load_initial_weights(model, dataclasses.replace(config, init_from=str(source)))
        expected = load_file(straight.run_dir / "checkpoints" / f"step-{step:08d}" / MODEL_FILE)
        assert_same(model.state_dict(), expected, rtol=0, atol=0)


def test_a_run_from_given_weights_begins_anew_and_resumes(straight, config, caplog):
    first = _run(config, run_name="first", init_from=str(straight.run_dir))
    assert f"init_from: the weights are those of {straight.run_dir}" in caplog.text
    lines = read_metrics(first.run_dir / "metrics.jsonl")
    assert lines[0]["kind"] == "eval"
    ended = read_metrics(straight.run_dir / "metrics.jsonl")[-1]
    assert lines[0]["loss"] == ended["loss"]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    second = _run(config, run_name="second", init_from=str(straight.run_dir), stop_after_steps=3)
    caplog.clear()
    _run(second, stop_after_steps=None)
    assert "init_from" not in caplog.text
    assert_same(_weights(second), _weights(first), rtol=0, atol=0)


def test_initial_weights_that_do_not_fit_or_are_not_there(straight, config, tmp_path):
    other = build_model(dataclasses.replace(config, model=dataclasses.replace(config.model, dim=32)), CPU)
    for source, said in (
        (tmp_path / "nowhere", "init_from: expected a checkpoint folder, a run directory or a file of weights"),
        (tmp_path, "init_from: .* is no checkpoint and holds no whole one"),
        (straight.run_dir, r"init_from: .*does not fit the model: .*expected shape \(64, 32\), got \(64, 16\)"),
        (straight.run_dir / "config.yaml", "init_from: .*config.yaml: cannot be read as weights"),
    ):
        with pytest.raises(ValueError, match=said):
            load_initial_weights(other, dataclasses.replace(config, init_from=str(source)))


def test_paths_are_saved_absolute(straight, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(dataclasses.replace(config, run_name="x", init_from="runs/straight"))
    assert trainer.config.init_from == str(straight.run_dir)
    assert Trainer(dataclasses.replace(config, resume="runs/straight")).config.resume == str(straight.run_dir)
    assert Trainer(config).config.resume == "auto"


def test_the_best_stay_beside_the_newest(config, tmp_path):
    model = build_model(config, CPU)
    losses = [5.0, 3.0, 4.0, None, 3.0, 6.0, 7.0]
    for step, loss in enumerate(losses, start=1):
        kept = dataclasses.replace(config, keep_ckpts=2, keep_best=2)
        save_checkpoint(tmp_path, step, model, {}, kept, RunIdentity("abc", 8), loss)
    names = [int(path.name[-8:]) for path in step_folders(tmp_path)]
    assert names == [2, 5, 6, 7]
    assert best_checkpoint(tmp_path)[1]["step"] == 5  # the newer of two
    save_checkpoint(tmp_path, 8, model, {}, dataclasses.replace(config, keep_ckpts=1, keep_best=0), RunIdentity("a", 8))
    assert [int(path.name[-8:]) for path in step_folders(tmp_path)] == [8]
    assert best_checkpoint(tmp_path) is None


def test_the_best_of_a_run(straight):
    losses = {step: json.loads((path / META_FILE).read_text())["evaluation_loss"]
              for path in step_folders(straight.run_dir) if (step := int(path.name[-8:]))}  # fmt: skip
    evaluated = {line["step"]: line["loss"] for line in read_metrics(straight.run_dir / "metrics.jsonl")
                 if line["kind"] == "eval"}  # fmt: skip
    assert losses == {step: evaluated[step] for step in (2, 4, 6)}
    best = SavedRun.open(straight.run_dir, checkpoint=Path("best"))
    assert best.checkpoint_name == f"step-{min(losses, key=losses.get):08d}"


def test_each_file_is_read_once(tmp_path):
    """By what the kernel counts of this process's reads; a mapping would show as a fault, and there is none."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    weights, state = {"a": torch.randn(500_000)}, {"moment": torch.randn(1_000_000)}
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(weights["a"])
    from m4.config import TrainConfig

    save_checkpoint(tmp_path, 1, model, state, TrainConfig(), RunIdentity("abc", 8))
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 6e6

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    saved = read_checkpoint(folder)
    assert size <= bytes_read() - before < 1.05 * size
    assert torch.equal(saved.weights["a"], weights["a"])
    assert torch.equal(saved.state["moment"], state["moment"])


def test_a_file_that_lost_its_shape(straight, tmp_path):
    path = shutil.copytree(straight.run_dir / "checkpoints" / "step-00000002", tmp_path / "copy")
    save_file({"a": torch.ones(3)}, path / MODEL_FILE)
    with pytest.raises(ValueError, match=r"copy/model.safetensors: expected \d+ bytes, got \d+"):
        read_checkpoint(path)
