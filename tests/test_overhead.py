"""The scripts that measure what a run adds to its steps, and how it scales: of a tiny run, whatever its figures are."""

import json
import sys

import pytest

from benchmarks import overhead, scaling
from m4.config import load_config
from m4.errors import ConfigError


def test_what_is_measured(tiny_config, monkeypatch):
    """Each kind of step is taken, saves are whole, and shares follow from seconds."""
    config, _ = load_config(tiny_config, ["eval_generate_samples=0", "save_ckpt_freq=0.08"])
    bare, taken = [], overhead.bare_step
    monkeypatch.setattr(overhead, "bare_step", lambda trainer: (bare.append(trainer.state.step), taken(trainer)))
    found = overhead.measure(config, pairs=3, saves=2)
    assert bare == [0, 1, 2, 3, 4]  # in turns with whole ones
    assert found["steps_between_saves"] == pytest.approx(10)
    assert 0 < found["inside_s"] < found["whole_s"]
    shares = found["shares"]
    at_once = (found["check_s"] + found["at_once_s"]) / 10 / found["bare_s"]
    assert shares["checkpoints at once"] == pytest.approx(at_once)
    assert shares["logging and checks, inside"] == pytest.approx(found["inside_s"] / found["bare_s"])
    assert 0 < found["background_held_s"] < found["background_lasted_s"]


def test_scaling_in_turns(tiny_config, tmp_path, monkeypatch, capsys):
    """The same samples a step; commands in turns, with the cores that each is to have."""
    trained = []

    def pretend(arguments, ranks, threads):
        keys = dict(one.split("=", 1) for one in arguments if "=" in one)
        trained.append((ranks, threads, int(keys["batch_size"])))
        folder = tmp_path.joinpath(keys["output_dir"], keys["run_name"])
        folder.mkdir(parents=True)
        seconds = [9.0] * scaling.WARM_UP + [0.4 / ranks**0.5] * 3
        lines = [{"kind": "train", "step": step, "step_s": s} for step, s in enumerate(seconds)]
        folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(scaling, "train", pretend)
    out = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["scaling", "--config", str(tiny_config), "--rounds", "2", "--out", str(out)])
    assert scaling.main() == 0
    assert trained == [(1, 2, 4), (2, 1, 2)] * 2
    found = json.loads(out.read_text())
    assert found["samples_per_s"]["one"] == pytest.approx([20.0, 20.0])
    assert found["ratio"] == pytest.approx(2**0.5)
    assert "2 ranks: 28.28, 1.414 of it" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["scaling", "--config", str(tiny_config), "batch_size=3"])
    with pytest.raises(ConfigError, match="batch_size: 3 samples cannot be shared by 2 ranks"):
        scaling.main()


def test_the_real_commands(tiny_config, tmp_path):
    """One process and two ranks, some steps each."""
    config, _ = load_config(tiny_config)
    for name, ranks in (("one", 1), ("two", 2)):
        keys = ["stop_after_steps=7", "eval_generate_samples=0", f"run_name={name}", f"batch_size={4 // ranks}"]
        scaling.train(["--config", str(tiny_config), *keys], ranks, 1)
        assert scaling.samples_per_second(config.run_dir.parent / name, 8) > 0
    with pytest.raises(ConfigError, match=r"ended with status 2: .*modl: unknown key"):
        scaling.train(["--config", str(tiny_config), "modl=3"], 1, 1)
