"""The ablation harness: which runs, what is said of them, what is done again, and one run of the real commands."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import ablation
from benchmarks.ablation import Failed, ablate, by_variant, draw, is_done, planned, spread, table
from m4.config import config_to_yaml, load_config
from m4.errors import ConfigError
from m4.pictures.curves import variant_curves
from tests.runs import REPOSITORY, run_command_line

VARIED = {"lr": ["0.002", "0.004"], "data.mirror": ["false", "true"]}


class Pretended:
    """In place of training and evaluating: writes what they write, error = 10 · lr · 1000 + seed (− 1 if mirrored)."""

    def __init__(self):
        self.commands = []
        self.stop_at = None  # (number of the command, status)

    def __call__(self, command):
        self.commands.append(command[2:])
        if self.stop_at and len(self.commands) == self.stop_at[0]:
            return self.stop_at[1]
        arguments = command[3:]
        if command[2] == "m4.train":
            config = load_config(arguments[1], arguments[2:])[0]
            config.run_dir.mkdir(parents=True, exist_ok=True)
            (config.run_dir / "config.yaml").write_text(config_to_yaml(ablation.resolve_paths(config)))
            (config.run_dir / "summary.json").write_text(json.dumps({"samples_per_s": 100.0}))
            lines = [self.line(config, tokens) for tokens in (0.0, 0.008, 0.016)]
            (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            folder = Path(arguments[1])
            options = dict(zip(arguments[::2], arguments[1::2], strict=True))
            pose = self.pose(load_config(folder / "config.yaml")[0])
            if "--samples" in options:
                pose["nearest"] = {"samples": int(options["--samples"]), "error_px": 1.0}
            evaluation = {"per_modality": {"coords": 4.0, "coords_next": None}, "next": {"pose": pose}}
            (folder / "evaluation-eval.json").write_text(json.dumps(evaluation))
        return 0

    def pose(self, config):
        error = 10_000 * config.lr + config.seed - config.data.mirror
        return {"error_px": error, "copy": {"error_px": 8.0}, "pck": {"0.2": 0.5}, "nats": 3.0}

    def line(self, config, tokens):
        losses = {"coords": 5.0, "coords_next": 6.0 - tokens}
        return {
            "kind": "eval",
            "step": 1,
            "tokens": tokens,
            "loss": 5.5,
            "per_modality": losses,
            "next": {"pose": self.pose(config)},
            **({"ema": {"loss": 4.5, "per_modality": {"coords_next": 5.0 - tokens}}} if config.ema else {}),
        }


@pytest.fixture
def execute():
    return Pretended()


@pytest.fixture
def plan(tiny_config, tmp_path):
    """A function: the runs of a variation."""

    def make(varied=VARIED, seeds=(0, 1, 2), settings=()):
        return planned(tiny_config, varied, seeds, list(settings), tmp_path / "out")

    return make


def test_every_combination_and_seed(plan):
    runs = plan(settings=["total_tokens=0.08"])
    assert len(runs) == 2 * 2 * 3
    assert [run.seed for run in runs[:4]] == [0, 1, 2, 0]
    assert runs[3].label == "lr=0.002, data.mirror=true"
    assert {(run.config.lr, run.config.data.mirror, run.config.seed) for run in runs} == {
        (lr, mirror, seed) for lr in (0.002, 0.004) for mirror in (False, True) for seed in (0, 1, 2)
    }
    assert len({run.config.run_dir for run in runs}) == 12
    assert all(run.config.total_tokens == 0.08 for run in runs)
    assert plan(varied={})[0].label == "as configured"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"varied": {"modl.dim": ["8"]}}, "modl.dim: unknown key"),
        ({"varied": {"lr": ["fast"]}}, "lr: expected"),
        ({"varied": {"seed": ["1"]}}, "seed: set by the ablation itself"),
        ({"settings": ["run_name=x"]}, "run_name: set by the ablation itself"),
        ({"settings": ["lr=1"]}, "lr: given to both --vary and --set"),
        ({"varied": {"data.root": ["/a b", "/a-b"]}}, "two combinations would be the run"),
    ],
)
def test_a_plan_that_cannot_be_run_is_said_before_any_work(plan, arguments, said):
    with pytest.raises(ConfigError, match=said):
        plan(**arguments)


def test_results(plan, execute, tiny_config, tmp_path):
    runs = plan()
    out = tmp_path / "out"
    results = ablate(tiny_config, runs, out, command="the command", execute=execute)
    assert json.loads((out / "ablation.json").read_text()) == results
    assert results["command"] == "the command"
    assert {"commit", "cpu", "threads", "torch"} <= set(results["environment"])
    first = results["runs"][4]
    assert (first["label"], first["seed"]) == ("lr=0.002, data.mirror=true", 1)
    assert first["made"]["commit"] == results["environment"]["commit"]
    figures = first["figures"]
    assert (figures["error_px"], figures["copy_px"], figures["pck_0.2"]) == (20.0, 8.0, 0.5)
    assert (figures["loss_coords"], figures["loss_coords_next"], figures["samples_per_s"]) == (4.0, None, 100.0)
    mirrored = results["variants"]["lr=0.002, data.mirror=true"]
    assert mirrored["error_px"] == {"mean": 20.0, "std": 1.0, "min": 19.0, "max": 21.0, "runs": 3}
    lines = table(results["variants"]).splitlines()
    assert len(lines) == 2 + 4
    assert lines[0].startswith("| variant | seeds | error_px |")
    assert lines[3].startswith("| lr=0.002, data.mirror=true | 3 | 20 ± 1 | 8 ± 0 |")
    assert "psnr" not in lines[0]  # of which no run says anything
    assert draw(runs, out / "ablation.png")
    assert (out / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    curve = ablation.curve(runs[0])
    assert [line["samples"] for line in curve] == [0, 8, 16]
    assert curve[0] == {"samples": 0, "error_px": 20.0, "copy_px": 8.0, "loss": 6.0}


def test_averaged_weights_are_drawn_beside_the_trained_ones(plan, execute, tiny_config, tmp_path, monkeypatch):
    """Of the same evaluations; a variant without them has none."""
    runs, drawn = plan({"ema": ["0", "0.9"]}, seeds=(0, 1)), {}

    def noted(variants, loss):
        drawn.update(variants)
        return variant_curves(variants, loss)

    monkeypatch.setattr(ablation, "variant_curves", noted)
    results = ablate(tiny_config, runs, tmp_path / "out", execute=execute)
    assert draw(runs, tmp_path / "elsewhere.png")
    assert list(drawn) == ["ema=0", "ema=0.9", "ema=0.9, averaged weights"]
    averaged = drawn["ema=0.9, averaged weights"]
    assert [[line["loss"] for line in run] for run in averaged] == [pytest.approx([5.0, 4.992, 4.984])] * 2
    assert {line["error_px"] for run in averaged for line in run} == {None}
    figures = [run["figures"] for run in results["runs"]]
    assert [one["last_loss"] for one in figures] == [5.5] * 4
    assert [one["averaged_last_loss"] for one in figures] == [None, None, 4.5, 4.5]
    assert figures[3]["averaged_last_loss_coords_next"] == pytest.approx(4.984)
    assert "| - | 5.984 ± 0 | - |" in table(results["variants"]).splitlines()[2]


def test_what_is_evaluated_is_not_run_again(plan, execute, tiny_config, tmp_path):
    runs = plan({"lr": ["0.002", "0.004"]})
    execute.stop_at = (6, 1)  # the evaluation of the third run
    with pytest.raises(Failed, match=r"m4\.evaluate .* ended with status 1"):
        ablate(tiny_config, runs, tmp_path / "out", execute=execute)
    assert [run["seed"] for run in json.loads((tmp_path / "out/ablation.json").read_text())["runs"]] == [0, 1]
    again = Pretended()
    results = ablate(tiny_config, runs, tmp_path / "out", execute=again)
    assert len(again.commands) == 2 * 4
    assert len(results["runs"]) == 6
    assert all(run["made"]["commit"] for run in results["runs"])
    last = Pretended()
    assert ablate(tiny_config, runs, tmp_path / "out", execute=last)["runs"] == results["runs"]
    assert last.commands == []


def test_more_figures_are_an_evaluation_more(plan, execute, tiny_config, tmp_path):
    runs = plan({})
    ablate(tiny_config, runs, tmp_path / "out", execute=execute)
    results = ablate(tiny_config, runs, tmp_path / "out", futures=4, max_samples=3, execute=execute)
    assert execute.commands[-1][-4:] == ["--samples", "4", "--max-samples", "3"]
    assert results["runs"][0]["figures"]["nearest_px"] == 1.0
    assert all(is_done(run, 4) for run in runs)
    assert not is_done(runs[0], 5)


def test_a_run_of_another_configuration_is_not_taken_for_done(plan, execute, tiny_config, tmp_path):
    ablate(tiny_config, plan({}), tmp_path / "out", execute=execute)
    with pytest.raises(ConfigError, match=r"--out: .*another configuration \(lr is 0\.002 there and 0\.007 now\)"):
        ablate(tiny_config, plan({}, settings=["lr=0.007"]), tmp_path / "out", execute=execute)


def test_ctrl_c_ends_it(plan, execute, tiny_config, tmp_path):
    execute.stop_at = (3, 130)
    with pytest.raises(KeyboardInterrupt):
        ablate(tiny_config, plan({}), tmp_path / "out", execute=execute)
    assert len(json.loads((tmp_path / "out/ablation.json").read_text())["runs"]) == 1


def test_what_a_run_saves_on_ctrl_c_is_waited_for(tmp_path, monkeypatch):
    """A process that takes half a second to save after the signal."""
    program = f"import time, pathlib; time.sleep(0.5); pathlib.Path({str(tmp_path / 'saved')!r}).touch()"
    wait, calls = subprocess.Popen.wait, []

    def interrupted(self, timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablation.execute([sys.executable, "-c", program])
    assert (tmp_path / "saved").exists()


def test_sigterm_is_handed_on():
    """To a process that ends with a status of its own, and to one that is killed by it."""
    parent = "import os, signal, sys, time\n"
    parent += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    signalled = "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(30)\n"
    assert ablation.execute([sys.executable, "-c", parent + signalled]) == 7
    assert ablation.execute([sys.executable, "-c", "import os, signal, time\n" + signalled]) == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_spread_by_hand():
    assert spread([1.0, 3.0, None]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "min": 1.0, "max": 3.0, "runs": 2}
    assert spread([5.0])["std"] is None
    assert spread([None]) == {"mean": None, "std": None, "min": None, "max": None, "runs": 0}
    records = [{"label": label, "figures": {"x": x}} for label, x in (("a", 1.0), ("b", None), ("a", 2.0))]
    variants = by_variant(records)
    assert (list(variants), variants["a"]["x"]["mean"], variants["b"]["x"]["runs"]) == (["a", "b"], 1.5, 0)
    assert table(variants).splitlines()[2:] == ["| a | 2 | 1.5 ± 0.71 |", "| b | 0 | - |"]


def test_a_colour_a_variant():
    def line(samples, error, loss=1.0):
        return {"samples": samples, "error_px": error, "copy_px": 8.0, "loss": loss}

    runs = {"a": [[line(0, 9.0), line(8, 7.0)], [line(0, 9.0), line(8, None)]], "b": [[line(0, 5.0)]]}
    figure = variant_curves(runs, "coords_next")
    pose, loss = figure.axes
    assert [line.get_color() for line in pose.lines] == ["C0", "C0", "C1", "k"]
    assert [text.get_text() for text in pose.get_legend().get_texts()] == ["a", "b", "copying the reference"]
    assert (pose.get_title(), loss.get_title(), len(loss.lines)) == ("next pose", "coords_next", 3)
    without = {"a": [[line(0, None)]]}
    assert [axes.get_title() for axes in variant_curves(without, "coords_next").axes] == ["coords_next"]
    assert variant_curves({"a": [[line(0, None, None)]]}, "coords_next") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vary", "lr"], "--vary: expected KEY=A,B"),
        (["--vary", "lr=1,1"], "--vary: expected KEY=A,B with different values"),
        (["--vary", "lr=1", "--vary", "lr=2"], "--vary: lr is given twice"),
        (["--seeds", "0,0"], "--seeds: expected different seeds"),
        (["--seeds", "a"], "--seeds: expected a whole number"),
    ],
)
def test_slips_of_the_command_line(tiny_config, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(
        "sys.argv", ["ablation", "--config", str(tiny_config), "--out", str(tmp_path / "o"), *arguments]
    )
    with pytest.raises(ConfigError, match=said):
        ablation.main()


def test_the_real_commands(tiny_config, tmp_path):
    """Two steps of a tiny run, trained and evaluated in processes of their own; the second time nothing is done."""
    settings = ["stop_after_steps=2", "eval_samples=2"]
    arguments = ["--config", tiny_config, "--vary", "lr=0.002", "--out", tmp_path / "out", "--set", *settings]
    done = run_command_line("benchmarks.ablation", *arguments, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "| lr=0.002 | 1 |" in done.stdout
    results = json.loads((tmp_path / "out/ablation.json").read_text())
    assert results["command"].endswith(" ".join(settings))
    run = results["runs"][0]
    evaluation = json.loads((tmp_path / "out/runs" / run["run"] / "evaluation-eval.json").read_text())
    assert run["figures"]["loss_coords_next"] == evaluation["per_modality"]["coords_next"]
    assert run["figures"]["samples_per_s"] > 0
    assert yaml.safe_load((tmp_path / "out/runs" / run["run"] / "config.yaml").read_text())["lr"] == 0.002
