"""What the ranks of a test do: trainings one after the other, in one process a rank, which takes seconds to start.

``python -m tests.rank_program CONFIG NAME …`` runs the trainings of these names; see `TRAININGS` and `GUARDED`.
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch

from m4.config import load_config
from m4.distributed import World, leave
from m4.training.trainer import Trainer
from tests.saved_runs import saved_config
from tests.training.step_setup import AS_ON_A_GPU, ON_A_CPU

torch.set_num_threads(1)
SHARDED = {"parallel": "fsdp"}
# What differs from the configuration; (steps to stop after …) where a run is resumed.
TRAININGS = {
    "ddp": ({}, [None]),
    "ddp-pieces": ({}, [7, None]),
    "fixed": ({"fixed": True}, [None]),
    "fixed-pieces": ({"fixed": True}, [7, None]),
    "fsdp": (SHARDED, [None]),
    "fsdp-pieces": (SHARDED, [7, None]),
    "fsdp-fixed": ({**SHARDED, "fixed": True}, [None]),
    "two-one-four": ({}, [7]),
    "two-one-four-on": ({"run_name": "two-one-four"}, [None]),
    "fsdp-one-four": (SHARDED, [7]),
    "fsdp-one-four-on": ({**SHARDED, "run_name": "fsdp-one-four"}, [None]),
    "moments": ({"moments": True}, [2]),
    "fsdp-moments": ({**SHARDED, "moments": True}, [2]),
    "diverges": ({"lr": 1e38, "eval_freq": 100.0}, [None]),
    "spoilt": ({"spoilt": True}, [None]),
    "fsdp-spoilt": ({**SHARDED, "spoilt": True}, [None]),
    "asleep": ({"hangs": "asleep"}, [None]),
    "stopped": ({"hangs": "stopped"}, [None]),
}
# {here}: the output directory.
GUARDED = {
    "skips": ({"spoilt": True, "skip_non_finite": 2}, [None]),
    "fsdp-skips": ({**SHARDED, "spoilt": True, "skip_non_finite": 2}, [None]),
    "fp16": ({"overflows": True, "dtype": "fp16"}, [None]),
    "ema": ({"ema": 0.9}, [7, None]),
    "muon": ({"optimizer": "muon"}, [None]),
    "fsdp-checkpointing": ({**SHARDED, "activation_checkpointing": True}, [None]),
    "full": ({"full": (5, 10)}, [None]),
    "full-at-the-end": ({"full": (20,)}, [None]),
    "branch": ({"resume": "{here}/two-one-four"}, [None]),
    "fsdp-from": ({**SHARDED, "init_from": "{here}/ddp"}, [1]),
}


def spoil_gradient(trainer):
    """Of the last rank alone, in the fifth step."""
    if trainer.world.rank == trainer.world.size - 1:
        trainer.model.dec_norm.register_forward_hook(
            lambda _, __, out: out * (torch.nan if out.requires_grad and trainer.state.step == 4 else 1)
        )


def overflow(trainer):
    """In the last rank's gradient of the fifth step, whose loss is finite."""
    if trainer.world.rank == trainer.world.size - 1:
        trainer.model.dec_norm.weight.register_hook(
            lambda gradient: gradient * torch.inf if trainer.state.step == 4 else gradient
        )


def fill_disk(trainer, steps):
    """The first rank cannot write checkpoints of these steps."""
    write = trainer.saver._write

    def limited(contents):
        if contents.step in steps:
            raise OSError(28, "No space left on device", "state.pt")
        write(contents)

    trainer.saver._write = limited


def hang(trainer, how):
    """The second rank, in the fourth step: asleep, though its process lives, or the whole process stopped."""
    take_step = trainer.train_step

    def step():
        if trainer.state.step == 3:
            trainer.world.link.watch.timeout = 3.0  # what takes long before is no matter on a busy machine
            while trainer.world.rank == 1:
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.1)
        return take_step()

    trainer.train_step = step


def train(config, world, name):
    """Run one of the trainings; returns what it raised, "" where nothing."""
    changes, stops = (TRAININGS | GUARDED)[name]
    here = config.output_dir
    changes = {key: v.format(here=here) if isinstance(v, str) else v for key, v in changes.items()}
    changes = {"run_name": name, **changes}
    execution = AS_ON_A_GPU if changes.pop("fixed", False) else ON_A_CPU
    if changes.pop("moments", False):
        folder = Path(config.output_dir)
        config = dataclasses.replace(saved_config(folder.parent / "moments", folder), batch_size=2, eval_samples=5)
    hangs, spoilt, full = changes.pop("hangs", ""), changes.pop("spoilt", False), changes.pop("full", ())
    overflows = changes.pop("overflows", False)
    for stop in stops:
        now = dataclasses.replace(config, stop_after_steps=stop, **changes)
        trainer = Trainer(now, execution=execution, world=world)
        if spoilt:
            spoil_gradient(trainer)
        if overflows:
            overflow(trainer)
        fill_disk(trainer, full)
        if hangs:
            hang(trainer, hangs)
        try:
            assert trainer.run("command") == 0
        except (ValueError, OSError) as error:
            return str(error)
    return ""


def main():
    path, *names = sys.argv[1:]
    config, _ = load_config(path)
    with World.from_environment().joined(60.0, "cpu") as world:
        for name in names:
            said = train(config, world, name)
            Path(config.output_dir, f"{name}.{world.rank}.said").write_text(said)
    leave(0)  # as m4.train does


if __name__ == "__main__":
    main()
