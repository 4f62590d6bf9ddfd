"""What cannot have room in memory ends in one line that names the key."""

import ctypes
import dataclasses
import resource
import subprocess
import sys

import pytest
import torch

from m4 import device as devices
from m4.batches.packing import drawn_counts
from m4.build import masking_spec
from m4.config import ModelSection, TrainConfig
from m4.device import enough_memory, total_memory
from m4.errors import ConfigError
from m4.schedule import Schedule
from m4.training import evaluating
from m4.training.preflight import check_memory
from m4.training.trainer import Trainer
from tests.runs import environment

CPU = torch.device("cpu")
GB = 10**9


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"batch_size": 2**20, "global_batch_size": 2**20}, "batch_size"),
        ({"batch_size": 100_000}, "batch_size"),
        ({"model": ModelSection(dim=2**16)}, "model"),
        ({"model": ModelSection(dim=2**14, enc_depth=64)}, "model"),
        ({"global_batch_size": 2**20, "batch_size": 1, "model": ModelSection(dim=64)}, "global_batch_size"),
    ],
    ids=str,
)
def test_what_is_too_large_is_named_before_the_work(monkeypatch, setting, key):
    size = 2 * GB if key == "global_batch_size" else 24 * GB
    monkeypatch.setattr("m4.training.preflight.total_memory", lambda _: size)
    config = dataclasses.replace(TrainConfig(device="cpu"), **setting)
    said = rf"^{key}: too large .* at least [\d,.]+ GB, cpu has 24?.0 GB .*lower {key}$"
    with pytest.raises(ConfigError, match=said):
        check_memory(config, _schedule(config), masking_spec(config), CPU)


def _schedule(config):
    samples = max(config.batch_size, config.global_batch_size)
    return Schedule(samples // config.batch_size, samples, 1, config.num_tokens_per_sample)


def test_the_recipe_is_not_refused(monkeypatch):
    """The estimate is far below the truth: 176 M parameters with their optimiser are 2.8 GB, a batch some more."""
    monkeypatch.setattr("m4.training.preflight.total_memory", lambda _: 4 * GB)
    config = TrainConfig()
    check_memory(config, Schedule.of(config, 1), masking_spec(config), CPU)


def test_the_estimate_is_below_what_a_step_holds(config):
    """Of a forward pass: the tensors that autograd saves are more than what is counted of them."""
    from tests.training.step_setup import ON_A_CPU, Steps

    steps = Steps(config, execution=ON_A_CPU)
    saved = 0

    def pack(tensor):
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    batch = next(steps.batches.step(0).micro_batches).masked
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        steps.model(batch)
    inputs, targets = len(batch.encoder.ids), len(batch.decoder.ids)
    model = steps.trainer.config.model
    assert saved > 4 * model.dim * (inputs * model.enc_depth + targets * model.dec_depth)
    drawn = drawn_counts(steps.trainer.spec, seed=config.seed, sample_ids=torch.arange(config.batch_size).numpy())
    assert [int(counts.sum()) for counts in drawn] == [inputs, targets]


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_limits_of_a_container_count(tmp_path, monkeypatch, name):
    whole = total_memory(CPU)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    monkeypatch.setattr(devices, "_CGROUP_LIMITS", (file, tmp_path / "absent"))
    for text, expected in (("max\n", whole), ("9223372036854771712\n", whole), ("1000000\n", 10**6)):
        file.write_text(text)
        assert total_memory(CPU) == expected


def _allocate(size):
    torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize("size", [2**60, (2**62, 4)], ids=str)
def test_what_torch_says_of_the_hosts_memory_is_known(size):
    with pytest.raises(ConfigError, match=r"not enough memory: .*lower it"), enough_memory("lower it"):
        _allocate(size)


@pytest.mark.parametrize(
    "error", [MemoryError(), MemoryError("Unable to allocate 74.5 GiB"), torch.OutOfMemoryError("x")]
)
def test_running_out_in_the_middle_is_one_line(config, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(evaluating, "evaluate", fails)
    with pytest.raises(ConfigError, match=r"not enough memory: .*lower batch_size"):
        Trainer(config).run("command")


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="a fault of ours"), enough_memory("lower it"):
        raise RuntimeError("a fault of ours")


def test_freed_memory_is_kept_for_the_next_step():
    """Blocks that are freed at every step's end cost page faults once, not at every step."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")
    # glibc raises its limits by what a process has freed before: set them, so that it gives everything back.
    program = (
        "import ctypes, resource, sys, torch, m4.device\n"
        "ctypes.CDLL(None).mallopt(m4.device._MMAP_THRESHOLD, 2**17)\n"
        "if sys.argv[1] == 'keep': m4.device.keep_freed_memory()\n"
        "def step():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    gradients = [torch.empty(640, 2560).fill_(1) for _ in range(20)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print([step() for _ in range(3)][-1])\n"
    )
    faults = {}
    for how in ("keep", "give back"):
        command = [sys.executable, "-c", program, how]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    pages = 20 * 4 * 640 * 2560 // resource.getpagesize()
    assert faults["keep"] < pages / 10
    assert faults["give back"] > pages / 2
