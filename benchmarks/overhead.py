"""`python -m benchmarks.overhead`: what logging, checks and checkpoints add to the training step.

One process trains on random tokens and takes the same step in turns: bare (data, forward, backward, clipping,
optimiser), and whole, as `m4.train` does (reading and checking the figures, metrics.jsonl, TensorBoard, the progress
line). Then it saves, at once and in the background, and times what a save holds up, and the steps that are taken while
a thread writes. A save's cost is divided by the steps between two saves of the recipe (`save_ckpt_freq`).

On a machine with other work the figures of single steps are noise; "inside" is the time spent in the added parts
themselves, which is not.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import timed
from benchmarks.results import write_figures
from benchmarks.steps import bare_step, random_stores
from m4.arguments import CommandParser, whole
from m4.cli import run_command
from m4.config import TrainConfig, load_config
from m4.device import HeapTrimmer
from m4.run.metrics import RunLog
from m4.schedule import Schedule
from m4.training.trainer import Trainer

WARM_UP = 2
GOAL = 0.02


class Added:
    """Seconds spent in a method of the trainer since `take`."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._method, self._seconds = getattr(trainer, name), 0.0
        setattr(trainer, name, self)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = self._method(*arguments, **keywords)
        self._seconds += time.perf_counter() - start
        return result

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def of_steps(trainer: Trainer, pairs: int) -> dict[str, float]:
    """Medians of bare and whole steps, taken in turns on the same samples, and of what is inside the whole ones."""
    heap, added = HeapTrimmer(), Added(trainer, "report")

    def whole_step() -> None:
        trainer.train_step()
        heap.step()
        trainer.stop.check_together()

    for _ in range(WARM_UP):
        bare_step(trainer)
        whole_step()
    added.take()
    bare, entire, inside = [], [], []
    for _ in range(pairs):
        bare.append(timed(lambda: bare_step(trainer)))
        trainer.step.read()
        entire.append(timed(whole_step))
        inside.append(added.take())
    found = {"bare_s": statistics.median(bare), "whole_s": statistics.median(entire)}
    return {**found, "inside_s": statistics.median(inside)}


def of_saves(trainer: Trainer, saves: int, step_s: float) -> dict[str, float]:
    """Seconds: of the check before a save, what it holds up, how long the writing lasts and what it adds to steps."""
    check = statistics.median(timed(trainer.divergence) for _ in range(saves))
    at_once, held, lasted, slower = [], [], [], []
    for number in range(saves + 1):
        trainer.train_step()
        at_once.append(timed(lambda: trainer.saver.save(trainer.trained.contents(), trainer.log, try_later=False)))
        trainer.train_step()
        start = time.perf_counter()
        seconds = timed(lambda: trainer.saver.save(trainer.trained.contents(), trainer.log, try_later=True))
        steps = [timed(trainer.train_step)]
        while trainer.saver.writing():
            steps.append(timed(trainer.train_step))
        trainer.saver.settle()
        if number:  # the first makes the copy's memory
            held.append(seconds)
            lasted.append(time.perf_counter() - start)
            slower.append(sum(steps) - len(steps) * step_s)
    return {
        "check_s": check,
        "at_once_s": statistics.median(at_once),
        "background_held_s": statistics.median(held),
        "background_lasted_s": statistics.median(lasted),
        "background_slower_s": max(0.0, statistics.median(slower)),
    }


def measure(config: TrainConfig, pairs: int, saves: int) -> dict[str, Any]:
    """All figures of a recipe; `shares` are of the step."""
    between = config.save_ckpt_freq * 1e6 / config.num_tokens_per_sample / Schedule.of(config, 1).samples_per_step
    with tempfile.TemporaryDirectory(prefix="m4-overhead-") as folder:
        config = replace(config, output_dir=folder, run_name="overhead", async_checkpoints=True)
        config = replace(config, keep_ckpts=1, keep_best=0)
        trainer = Trainer(config, stores=random_stores(config))
        trainer.config.run_dir.mkdir(parents=True)
        trainer.log = RunLog(trainer.config.run_dir, trainer.config, -1)
        trainer.progress.start(peak=1e12)
        try:
            steps = of_steps(trainer, pairs)
            saved = of_saves(trainer, saves, steps["whole_s"])
        finally:
            trainer.close()
    step = steps["bare_s"]
    shares = {
        "logging and checks, whole over bare": steps["whole_s"] / step - 1,
        "logging and checks, inside": steps["inside_s"] / step,
        "checkpoints at once": (saved["check_s"] + saved["at_once_s"]) / between / step,
        "checkpoints in the background": (
            (saved["check_s"] + saved["background_held_s"] + saved["background_slower_s"]) / between / step
        ),
    }
    return {"steps_between_saves": between, **steps, **saved, "shares": shares}


def main() -> int:
    parser = CommandParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("M4-tiny.yaml"), help="the recipe (default M4-tiny.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--pairs", type=whole(1), default=40, help="steps of each kind (default 40)")
    parser.add_argument("--saves", type=whole(1), default=3, help="saves of each kind (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_intermixed_args()
    config, _ = load_config(arguments.config, arguments.overrides)
    found = measure(config, arguments.pairs, arguments.saves)
    for name, value in found.items():
        if name != "shares":
            print(f"{name:<22} {value:.4g}")
    for name, share in found["shares"].items():
        print(f"{name:<36} {share:8.3%} of the step{'' if share < GOAL else f'  above the goal of {GOAL:.0%}'}")
    if arguments.out:
        write_figures(arguments.out, found)
    return 0


if __name__ == "__main__":
    run_command(main)
