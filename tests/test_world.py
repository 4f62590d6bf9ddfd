"""The processes of a run: what torchrun says of them, their shares of a step, and which one is lost."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from m4.batches.order import SampleOrder
from m4.batches.train import TrainBatches
from m4.build import data_root, masking_spec, open_split
from m4.checkpoint import RunIdentity, check_same_run, checkpoint_meta, newest_whole
from m4.config import load_config
from m4.device import device_of_rank
from m4.distributed import World, count_from_environment
from m4.distributed.watch import Beat, Seen, verdict
from m4.errors import CheckpointError, ConfigError
from m4.schedule import Schedule
from m4.training.trainer import Trainer

CPU = torch.device("cpu")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("text", ["", " ", "two", "1.0", "-1", "1e3", "٣", "9" * 5000])
def test_what_is_no_number_of_processes(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE: expected a number, got"):
        World.from_environment()


def test_what_torchrun_says(no_launcher, monkeypatch):
    assert World.from_environment() == World(rank=0, size=1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World.from_environment() == World(rank=0, size=1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"RANK: not set, with WORLD_SIZE=4; .* torchrun"):
        World.from_environment()
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(3, 4, 1, 2)
    assert not World.from_environment().leads
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="RANK: expected a rank below 4, got 4"):
        World.from_environment()
    assert count_from_environment("WORLD_SIZE", 1) == 4


def test_alone_nothing_is_exchanged():
    world = World()
    with world.joined(1.0, "cpu") as joined, joined.waiting():
        assert joined is world
    assert world.largest(7) == 7
    assert world.gather("a") == ["a"]
    assert world.first(None) is None
    assert list(world.told(iter((1, 2)))) == [1, 2]
    assert world.one_first(lambda: 3) == 3
    world.must_agree({"seed": 0})


def test_a_gpu_for_each_rank(monkeypatch):
    world = World(1, 2, 1, 2)
    assert device_of_rank("cpu", world) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device: cuda:0 is one GPU for 2 ranks"):
        device_of_rank("cuda:0", world)
    with pytest.raises(ConfigError, match="has 1 CUDA devices for 2 ranks; start 1"):
        device_of_rank("auto", world)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel=tp", "parallel: expected ddp or fsdp, got 'tp'"),
        ("rank_timeout=0", "rank_timeout: expected seconds in 1 … 1e6, got 0"),
    ],
)
def test_keys(tiny_config, override, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(tiny_config, [override])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kernels", "reference"),
        ("compile", True),
        ("cuda_graphs", "on"),
        ("ema", 0.5),
        ("optimizer", "muon"),
        ("dtype", "fp16"),
    ],
)
def test_what_does_not_go_with_fsdp(config, key, value):
    from m4.training.exchange import exchange_of

    config = dataclasses.replace(config, parallel="fsdp", **{key: value})
    with pytest.raises(
        ConfigError, match=rf"^{key}: {value} does not go with parallel=fsdp; set {key}=.* or parallel=ddp"
    ):
        exchange_of(config, torch.nn.Linear(1, 1), World(0, 2), CPU)


# Shares of a step


def _step(config, fixed, world, position):
    store = open_split(config, data_root(config), "train")
    schedule = Schedule.of(config, world.size)
    order, spec = SampleOrder(len(store), config.seed), masking_spec(config)
    batches = TrainBatches(store, order, spec, config, schedule, CPU, fixed_shapes=fixed, world=world)
    step = batches.step(position)
    return step, list(step.micro_batches)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_micro_batches_of_all_ranks_are_those_of_one(config, fixed, ranks):
    """The very same tensors, in the order of the ranks; counts and figures are of the whole step on each."""
    config.batch_size, config.global_batch_size = 2, 48  # samples are dealt in three groups
    for position in (0, 48):
        whole, batches = _step(config, fixed, World(), position)
        shares = [_step(config, fixed, World(rank, ranks), position) for rank in range(ranks)]
        together = [batch for _, share in shares for batch in share]
        assert len(together) == len(batches) == 24
        for one, other in zip(batches, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.masked.tensors(), other.masked.tensors(), strict=True))
        for step, share in shares:
            assert torch.equal(step.counts, whole.counts)
            assert np.array_equal(step.targets, whole.targets)
            assert sum(batch.samples for batch in share) == 48
            assert sum(b.valid_tokens for b in share) == sum(b.valid_tokens for b in batches)


def test_another_number_of_ranks_keeps_the_samples_of_a_step(saved_config_and_meta):
    config, path, meta = saved_config_and_meta

    def check(ranks, **changes):
        now = dataclasses.replace(config, **changes)
        samples = Schedule.of(now, ranks).samples_per_step
        return check_same_run(path, meta, now, RunIdentity(meta["data_fingerprint"], samples, ranks))

    assert check(1) == check(2) == check(4, batch_size=2) == []
    with pytest.raises(
        CheckpointError, match=r"samples a step .* is 8 there and 16 now; with 4 ranks set batch_size=2"
    ):
        check(4)
    with pytest.raises(CheckpointError, match=r"3 ranks cannot share 8 samples: start a number of ranks that divides"):
        check(3)
    assert check(4, batch_size=2, global_batch_size=8) == []  # what the message says


@pytest.fixture
def saved_config_and_meta(tiny_config):
    config, _ = load_config(tiny_config, ["stop_after_steps=1"])
    assert Trainer(config).run("command") == 0
    path, _ = newest_whole(config.run_dir)
    meta = checkpoint_meta(path)
    assert meta["ranks"] == 1
    return config, path, meta


# What tells a rank that hangs from those that wait for it


def _seen(**ranks):
    """Ranks as (looked, moved, waits, waiting): seconds ago."""
    return {
        int(name[1:]): Seen(Beat(5, 5, waits, waiting, f"host, process {name[1:]}"), -looked, -moved)
        for name, (looked, moved, waits, waiting) in ranks.items()
    }


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({"r0": (1, 1, 9, False), "r1": (1, 1, 9, True)}, None),
        ({"r0": (1, 99, 9, True), "r1": (1, 1, 9, False)}, None),  # rank 1 evaluates, and gets on
        ({"r0": (1, 99, 9, False), "r1": (1, 99, 9, False)}, None),  # both read a large file: nobody waits
        (
            {"r0": (1, 99, 9, True), "r1": (99, 99, 9, True)},
            r"^rank 1 \(host, process 1\) gave no sign of life for 10 s",
        ),
        (
            {"r0": (1, 99, 9, True), "r1": (1, 99, 9, False)},
            r"^rank 1 \(.*\) made no progress for 10 s \(rank_timeout\)",
        ),
        ({"r0": (1, 99, 9, True), "r1": (1, 99, 8, True), "r2": (1, 99, 9, True)}, r"^rank 1 \(.*\) fell behind"),
        ({"r0": (1, 99, 9, True), "r1": (1, 99, 9, True)}, r"^all ranks waited for each other for 10 s"),
        (
            {"r0": (1, 1, 0, True), "r1": (99, 99, 0, False), "r2": (99, 9, 0, True)},
            r"^ranks 1 \(.*\), 2 \(.*\) gave no",
        ),
    ],
)
def test_which_rank_is_lost(ranks, said):
    found = verdict(_seen(**ranks), now=0.0, timeout=10.0)
    assert (found is None) if said is None else re.search(said, found), found
