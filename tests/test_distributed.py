"""Many ranks are one process: the same losses; they stop, fail and go on together."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from m4.checkpoint import checkpoint_meta, newest_whole
from m4.config import load_config
from m4.distributed import World
from m4.run.directory import only_process
from m4.run.metrics import read_metrics
from m4.training.trainer import Trainer
from tests.rank_program import TRAININGS, train
from tests.ranks import SECONDS, ended, run_ranks, started, wait_for
from tests.runs import REPOSITORY, environment, write_config
from tests.saved_runs import write_data
from tests.training.step_setup import assert_same

CPU = torch.device("cpu")
# Coordinate bins are 50 of 64 rows: of the parts that ranks hold, some have bins alone.
RATES = {"vocab_sizes": [64, 50, 64, 50], "vocab_lr_scale": 0.5, "coords_lr_scale": 2.0}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


# Ranks that train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, token_root):
    """Runs of 20 steps of 8 samples, two a micro-batch, by 1, 2 and 4 ranks; 2 → 1 → 4 ranks in one run too."""
    folder = tmp_path_factory.mktemp("ranks")
    path = write_config(folder / "tiny.yaml", token_root)
    text = path.read_text().replace("batch_size: 4\n", "batch_size: 2\n", 1)
    path.write_text(
        text.replace("vocab_sizes: [64, 64, 64, 64]\n", "\n".join(f"{k}: {v}" for k, v in RATES.items()) + "\n")
    )
    config, _ = load_config(path)
    config.keep_ckpts = 9
    write_data(folder / "moments", {"train": 5, "eval": 6})
    alone = dataclasses.replace(config, output_dir=str(folder / "1"))
    assert [train(alone, World(), name) for name in ("ddp", "fixed", "moments")] == [""] * 3
    names = {2: [*TRAININGS], 4: ["ddp", "fsdp"]}
    for name in ("asleep", "stopped", "two-one-four-on", "fsdp-one-four-on"):
        names[2].remove(name)
    for ranks in (2, 4):
        (folder / str(ranks)).mkdir()
        here = folder / str(ranks) / "tiny.yaml"
        here.write_text(
            path.read_text().replace(f"output_dir: {folder / 'runs'}", f"output_dir: {folder / str(ranks)}")
        )
        _all_end_well(run_ranks(ranks, "tests.rank_program", here, *names[ranks]))
        if ranks == 2:
            for name in ("two-one-four", "fsdp-one-four"):  # … goes on alone to step 13
                alone = dataclasses.replace(config, run_name=name, output_dir=str(folder / "2"), stop_after_steps=13)
                assert Trainer(alone).run("command") == 0
            _all_end_well(run_ranks(4, "tests.rank_program", here, "two-one-four-on", "fsdp-one-four-on"))
    return folder


def _all_end_well(outcomes):
    for status, said in outcomes:
        assert status == 0, said
    assert all(said == "" for _, said in outcomes[1:]), "one rank speaks"


def _lines(run_dir, kind="train"):
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == kind]


def _weights(run_dir):
    path, meta = newest_whole(run_dir)
    assert meta["step"] == 20
    return load_file(path / "model.safetensors")


def _optimizer(run_dir):
    return torch.load(newest_whole(run_dir)[0] / "state.pt", weights_only=True)["optimizer"]


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (2, "ddp"),
        (4, "ddp"),
        (2, "fsdp"),
        (4, "fsdp"),
        (2, "fixed"),
        (2, "fsdp-fixed"),
        (2, "two-one-four"),
        (2, "fsdp-one-four"),
    ],
)
def test_ranks_are_one_process(trained, ranks, name):
    """Losses within 1e-6 over 20 steps; "two-one-four" by 2, 1, 4 ranks.

    Norms of gradients within 1e-4: what roundings move weights by shows in them by way of the second derivative.
    """
    one = trained / "1" / ("fixed" if "fixed" in name else "ddp")
    many = trained / str(ranks) / name
    for kind in ("train", "eval"):
        expected, found = _lines(one, kind), _lines(many, kind)
        found = [line for line in found if kind == "train" or line["step"] % 5 == 0]  # not where it was resumed
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for a, b in zip(expected, found, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
            losses = [[loss or 0.0 for loss in line["per_modality"].values()] for line in (a, b)]
            assert losses[1] == pytest.approx(losses[0], rel=4e-6)
            assert b["tokens"] == a["tokens"]
            if kind == "train":
                assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
                assert (b["samples"], b["lr"]) == (a["samples"], a["lr"])
    assert_same(_weights(one), _weights(many), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["ddp", "fixed", "fsdp"])
def test_twenty_steps_are_seven_and_thirteen(trained, name):
    """On two ranks, to the bit."""
    whole, pieces = trained / "2" / name, trained / "2" / f"{name}-pieces"
    assert_same(_weights(whole), _weights(pieces), rtol=0, atol=0)
    assert [x["loss"] for x in _lines(whole)] == [x["loss"] for x in _lines(pieces)]


@pytest.mark.parametrize("name", ["moments", "fsdp-moments"])
def test_ranks_predict_the_next_moment(trained, name):
    """With weights of which each holds but a part, and batches that do not come out even."""
    for step in (0, 2):
        one, many = (
            next(line for line in _lines(trained / folder, "eval") if line["step"] == step)
            for folder in ("1/moments", f"2/{name}")
        )
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert many["samples"] == one["samples"] == 5
        assert many["next"]["frame"]["token_accuracy"] == one["next"]["frame"]["token_accuracy"]
        for figure in ("nats", "error_px"):
            assert many["next"]["pose"][figure] == pytest.approx(one["next"]["pose"][figure], rel=1e-5)


def test_checkpoints_know_no_ranks(trained):
    """Names, shapes and types of weights and of the optimiser's state are those of one process."""
    one = trained / "1" / "ddp"
    for many in ("2/ddp", "2/fsdp", "4/fsdp"):
        assert {n: t.shape for n, t in _weights(one).items()} == {
            n: t.shape for n, t in _weights(trained / many).items()
        }
        expected, found = _optimizer(one), _optimizer(trained / many)
        assert found["param_groups"] == expected["param_groups"]
        assert found["state"].keys() == expected["state"].keys()
        for number, moments in expected["state"].items():
            for kind, moment in moments.items():
                other = found["state"][number][kind]
                assert type(other) is torch.Tensor
                torch.testing.assert_close(other, moment, rtol=2e-3, atol=1e-6)
        assert checkpoint_meta(newest_whole(trained / many)[0])["ranks"] == int(many[0])


def test_all_ranks_find_a_run_that_diverged(trained):
    """Also where one of them alone has the samples that make it diverge: the others say the same of the same step."""
    for name, said in (("diverges", r"step \d+: "), ("spoilt", r"step 5: "), ("fsdp-spoilt", r"step 5: ")):
        texts = [(trained / "2" / f"{name}.{rank}.said").read_text() for rank in range(2)]
        assert texts[0] == texts[1]
        assert re.match(said, texts[0]), texts[0]
        summary = json.loads((trained / "2" / name / "summary.json").read_text())
        assert not summary["finished"]


# Ranks that stop, die and hang, through the command


def _command(config, *overrides):
    return ("m4.train", "--config", config, *overrides)


LONG = ("total_tokens=80", "eval_freq=100", "save_ckpt_freq=100")  # 10,000 steps


def _newest_step(run_dir):
    return max((int(path.name[-8:]) for path in (run_dir / "checkpoints").glob("step-*")), default=-1)


def test_torchrun(tiny_config):
    """The launcher itself: rank 0 speaks, and what is trained is what one process trains."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    clean = {name: value for name, value in environment().items() if name not in LAUNCHED}
    done = subprocess.run(
        [*launcher, "-m", *map(str, _command(tiny_config))],
        cwd=REPOSITORY,
        env=clean,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("4 samples x 1 accumulated x 2 ranks = 8 samples a step") == 1
    config, _ = load_config(tiny_config)
    alone = dataclasses.replace(config, run_name="alone")
    assert Trainer(alone).run("command") == 0
    losses = [[line["loss"] for line in _lines(c.run_dir)] for c in (config, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_rank_killed_in_a_run_that_saves(trained, tiny_config):
    """The other ends by itself and says which died; restarted, two ranks end with the bits of two undisturbed ones."""
    every_step = [f"{key}={value}" for key, value in RATES.items()]
    every_step += ("batch_size=2", "save_ckpt_freq=0.008", "keep_ckpts=30", "eval_freq=0.04")
    run_dir = tiny_config.parent / "runs" / "tiny"
    with started(2, *_command(tiny_config, *every_step)) as processes:
        wait_for(lambda: _newest_step(run_dir) >= 7)
        processes[1].send_signal(signal.SIGKILL)
        (status, said), (killed, _) = ended(processes)
    assert killed == -signal.SIGKILL
    assert status == 2, said
    assert re.search(rf"^error: rank 1 \([^)]*process {processes[1].pid}\) died: no sign of life for 5 s", said, re.M)
    assert "Traceback" not in said
    assert 7 <= newest_whole(run_dir)[1]["step"] < 20
    _all_end_well(run_ranks(2, *_command(tiny_config, *every_step)))
    assert_same(_weights(trained / "2" / "ddp"), _weights(run_dir), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_rank_that_hangs_ends_all(tiny_config, how):
    """One whose process is stopped, and one that lives but gets nowhere: named, with the time-out."""
    (tiny_config.parent / "runs").mkdir()
    with started(2, "tests.rank_program", tiny_config, how) as processes:
        outcomes = ended(processes[:1] if how == "stopped" else processes)  # what is stopped ends when it is killed
    for rank, (status, said) in enumerate(outcomes):
        assert status == 2, said
        by = "" if rank == 0 else "ended with rank 0: "
        what = r"(gave no sign of life|made no progress) for 3 s \(rank_timeout\)"
        assert re.search(rf"^error: rank {rank}: {by}rank 1 \([^)]*process {processes[1].pid}\) {what}", said, re.M), (
            said
        )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tiny_config, signum):
    run_dir = tiny_config.parent / "runs" / "tiny"
    with started(2, *_command(tiny_config, *LONG)) as processes:
        wait_for(lambda: (run_dir / "metrics.jsonl").exists() and "train" in (run_dir / "metrics.jsonl").read_text())
        processes[1].send_signal(signum)
        outcomes = ended(processes)
    assert [status for status, _ in outcomes] == [128 + signum] * 2, outcomes
    said = outcomes[0][1]
    step = int(re.search(rf"stopping on {signum.name} after step (\d+)", said)[1])
    assert "torchrun --nproc-per-node=2 -m m4.train" in said
    assert newest_whole(run_dir)[1]["step"] == step
    assert _lines(run_dir)[-1]["step"] == step


def test_what_one_rank_cannot_do_ends_all(tiny_config):
    """The first says why; what all have to say is said once."""
    config, _ = load_config(tiny_config)
    with only_process(config.run_dir):
        (status, first), (other, second) = run_ranks(2, *_command(tiny_config))
    assert (status, other) == (2, 2)
    assert first.splitlines()[-1].startswith("error: ")
    assert "another process is training there" in first
    assert re.match(r"error: rank 1: ended with rank 0: .*another process is training there", second.splitlines()[-1])


def test_a_second_ctrl_c_leaves_at_once(tiny_config):
    """Out of the wait for another rank, which is stopped here."""
    run_dir = tiny_config.parent / "runs" / "tiny"
    with started(2, *_command(tiny_config, *LONG)) as processes:
        wait_for(lambda: (run_dir / "metrics.jsonl").exists() and "train" in (run_dir / "metrics.jsonl").read_text())
        processes[0].send_signal(signal.SIGSTOP)  # so that the other one waits for it
        time.sleep(0.5)
        processes[1].send_signal(signal.SIGINT)
        time.sleep(1.0)
        processes[1].send_signal(signal.SIGINT)
        (status, said) = ended(processes[1:])[0]
    assert status == 130, said
    assert "leaving at once, without saving" in said
    assert newest_whole(run_dir) is None


def test_a_dry_run_is_of_one_process(tiny_config):
    of_two = {**environment(), "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, _command(tiny_config, "--dry-run"))],
        cwd=REPOSITORY,
        env=of_two,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2
    assert re.match(r"error: --dry-run: works in one process, this is one of 2 .* without torchrun$", done.stderr)


def test_ranks_that_never_meet(tiny_config):
    environment_of_one = {**environment(), "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, _command(tiny_config, "rank_timeout=1"))],
        cwd=REPOSITORY,
        env={**environment_of_one, "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"^error: rank 0 did not meet all 2 ranks within 1 s \(rank_timeout\)", done.stderr, re.M)
    assert not os.path.exists(tiny_config.parent / "runs")
