"""``--dry-run``: says what a run comes to, checks its first batch, and writes nothing."""

import dataclasses
import re
import shutil

import pytest
import torch

import m4.train
from m4.build import build_model
from m4.checkpoint import checkpoint_bytes, step_folders
from m4.data.store import is_at_hand, open_store
from m4.training.plan import dry_run, estimate_memory
from m4.training.trainer import Trainer
from tests.runs import write_config, write_tokens

CPU = torch.device("cpu")


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def config(tiny_train_config):
    return dataclasses.replace(tiny_train_config, eval_generate_samples=0, eval_freq=100, save_ckpt_freq=100)


def test_nothing_is_written_and_every_number_has_its_source(tmp_path, monkeypatch, capsys):
    root = tmp_path / "tokens"
    write_tokens(root, "train", 11, seed=0)
    write_tokens(root, "eval", 7, seed=1)
    path = write_config(tmp_path / "tiny.yaml", root)
    before = _files(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--config", str(path), "--dry-run", "global_batch_size=21", "ema=0.9", "keep_best=2"]
    monkeypatch.setattr("sys.argv", arguments)
    assert m4.train.main() == 0
    assert _files(tmp_path) == before
    said = capsys.readouterr().out
    model = build_model(Trainer(m4.train.load_config(path)[0]).config, CPU)
    for expected in (
        f"parameters     {model.num_parameters():,}, of which {2 * 64 * 16:,} for the vocabulary",
        "accumulation   5  (global_batch_size 21 over batch_size 4 x 1 processes, rounded, at least 1)",
        "samples a step 20  ",
        "samples        160  (total_tokens 0.16 M over num_tokens_per_sample 1000)",
        "steps          8  ",
        "11 training and 7 evaluation samples",
        "starts from    initial values by model.init  (resume: auto, init_from)",
        f"a checkpoint      {checkpoint_bytes(model, averaged=True) / 1e6:.2f} MB  (weights, moments, averages)",
        "keep_ckpts 3 + keep_best 2 + the one being written",
        "one-batch check:\n  passed",
        "global_batch_size: 21",
        "dry run: nothing was written",
    ):
        assert expected in said, expected
    rates = dict(re.findall(r"step +(\d+) .* lr ([\d.e-]+)", said))
    assert set(rates) == {"1", "2", "4", "6", "8"}
    assert float(rates["2"]) == pytest.approx(0.002, rel=0.01)
    assert float(rates["8"]) == pytest.approx(1e-7)


def test_packed_tokens_are_read_where_they_are(config, monkeypatch):
    Trainer(config)  # packs them
    opened = []

    def noting(*arguments, cache_dir, **keywords):
        opened.append(cache_dir)
        return open_store(*arguments, cache_dir=cache_dir, **keywords)

    monkeypatch.setattr("m4.build.open_store", noting)
    dry_run(config)
    assert {str(place) for place in opened} == {config.data.cache_dir}


def test_a_packed_store_is_known_as_open_store_knows_it(tmp_path, config):
    root = tmp_path / "tokens"
    write_tokens(root, "train", 3, seed=0)
    arguments = (root, "train", config.modalities)
    assert not is_at_hand(*arguments, config.max_seq_lens)
    assert not (root / ".cache").exists()
    open_store(*arguments, config.vocab_sizes, config.max_seq_lens)
    assert is_at_hand(*arguments, config.max_seq_lens)
    assert not is_at_hand(*arguments, config.max_seq_lens, tmp_path / "elsewhere")
    (token,) = (root / "train" / "coords" / "000001").iterdir()
    shutil.copy(token, token.with_suffix(".new"))
    token.with_suffix(".new").replace(token)
    assert not is_at_hand(*arguments, config.max_seq_lens)


def test_what_would_stop_the_run_stops_the_dry_run(config):
    assert Trainer(dataclasses.replace(config, stop_after_steps=2)).run("command") == 0
    before = _files(config.run_dir)
    said = dry_run(config)
    assert f"starts from    {step_folders(config.run_dir)[-1]}, step 2  (resume: auto" in said
    for changes, error in (({"seed": 4}, "seed is 0 there and 4 now"), ({"resume": "never"}, "resume: never, but")):
        with pytest.raises(ValueError, match=error):
            dry_run(dataclasses.replace(config, **changes))
    assert _files(config.run_dir) == before


def test_the_estimate_of_memory_against_what_autograd_keeps(config):
    """At a size at which activations count: within a third of the bytes kept for the backward pass of the blocks."""
    model = dataclasses.replace(config.model, dim=64, head_dim=16, enc_depth=3, dec_depth=3)
    config = dataclasses.replace(config, model=model, batch_size=64, global_batch_size=64)
    for recompute in (False, True):
        trainer = Trainer(dataclasses.replace(config, activation_checkpointing=recompute))
        (batch,) = (one.masked for one in trainer.batches.step(0).micro_batches)
        kept: dict[int, int] = {}

        def save(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            trainer.model.decode(batch)
        found = sum(size for place, size in kept.items() if place not in own)
        estimate = estimate_memory(trainer.config, trainer)
        if recompute:
            assert found < estimate.activations  # which counts a block that is computed again
        else:
            assert estimate.activations == pytest.approx(found, rel=1 / 3)
        count = sum(p.numel() for p in trainer.model.parameters())
        assert (estimate.weights, estimate.moments, estimate.averages) == (4 * count, 8 * count, 0)
        assert estimate.copy == 12 * count
    at_once = Trainer(dataclasses.replace(config, async_checkpoints=False))
    assert estimate_memory(at_once.config, at_once).copy == 0
