"""``data.root`` of a packed data set: training, evaluation and generation as from folders, bit for bit."""

import dataclasses
import json

import pytest
import torch

import m4.evaluate
import m4.generate
from m4.cli import exit_status
from m4.config import TrainConfig
from m4.data.packed.packing import pack
from m4.training.trainer import Trainer

CPU = torch.device("cpu")


def with_root(config: TrainConfig, root) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))


@pytest.fixture
def packed(token_root, tmp_path):
    """token_root in several shards, packed in two goes so that the training split is a list of rows."""
    pack([token_root], tmp_path / "packed", shard_rows=4, progress=False)
    return tmp_path / "packed"


@pytest.mark.parametrize("resident", [None, True])
def test_the_same_steps(config, packed, resident):
    """Losses, gradients' norm and weights of some steps, over the end of an epoch, resident on the device or not."""
    runs = {}
    for root in (config.data.root, packed):
        trainer = Trainer(with_root(config, root), device=CPU, resident=resident)
        figures = [trainer.train_step() for _ in range(3)]
        runs[str(root)] = trainer.identity, [(f.losses, f.norm) for f in figures], trainer.model.state_dict()
    (one, losses, weights), (other, other_losses, other_weights) = runs.values()
    assert one == other
    assert losses == other_losses
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


def test_a_run_moves_from_folders_to_shards(config, packed):
    """20 steps = some from folders and the rest from shards: a checkpoint knows the content, not where it lies."""
    straight = dataclasses.replace(config, run_name="straight")
    assert Trainer(straight, device=CPU).run("") == 0
    first = dataclasses.replace(config, stop_after_steps=7)
    assert Trainer(first, device=CPU).run("") == 0
    trainer = Trainer(with_root(config, packed), device=CPU)
    assert trainer.run("") == 0
    assert trainer.state.step == 20
    ended = Trainer(straight, device=CPU)
    ended.resume()
    weights = ended.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.state.evaluation == ended.state.evaluation


def test_evaluated_and_generated_from(saved_run, picture_data, tmp_path, monkeypatch, capsys):
    pack([picture_data], tmp_path / "packed", shard_rows=2, progress=False)
    results = []
    for root in (picture_data, tmp_path / "packed"):
        for main, more in (
            (m4.evaluate.main, []),
            (m4.generate.main, ["--out", str(tmp_path / "p.png"), "--samples", "3"]),
        ):
            monkeypatch.setattr("sys.argv", ["command", "--run", str(saved_run), "--data", str(root), *more])
            assert exit_status(main) == 0, capsys.readouterr().err
        evaluation = json.loads((saved_run / "evaluation-eval.json").read_text())
        evaluation = {key: value for key, value in evaluation.items() if key != "data_root"}
        results.append((evaluation, (tmp_path / "p.png").read_bytes()))
    assert results[0] == results[1]
