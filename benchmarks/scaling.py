"""`python -m benchmarks.scaling`: N ranks of one core each against one process with N threads, on this machine.

Trains the same recipe both ways in turns, by the real commands in processes of their own, and compares samples a second
(the median over steps after the first ones). Wants N idle cores; with a GPU each give device=cuda, and N counts GPUs
against one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.results import write_figures
from m4.arguments import CommandParser, whole
from m4.cli import run_command
from m4.config import load_config
from m4.errors import ConfigError
from m4.run.metrics import METRICS_FILE, read_metrics
from m4.schedule import Schedule

WARM_UP = 5  # steps that are not counted


def samples_per_second(run_dir: Path, samples: int) -> float:
    """The median over the steps of a run, of so many samples each."""
    lines = [line for line in read_metrics(run_dir / METRICS_FILE) if line["kind"] == "train"]
    return samples / statistics.median(line["step_s"] for line in lines[WARM_UP:])


def train(arguments: list[str], ranks: int, threads: int) -> None:
    """Raises ConfigError with what it said, where it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "m4.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")


def main() -> int:
    parser = CommandParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("M4-tiny.yaml"), help="the recipe (default M4-tiny.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both; batch_size is of one process")
    parser.add_argument("--ranks", type=whole(2), default=2, help="default 2")
    parser.add_argument("--steps", type=whole(WARM_UP + 1), default=40, help="of a run (default 40)")
    parser.add_argument("--rounds", type=whole(1), default=3, help="runs of each kind, in turns (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_intermixed_args()
    config, _ = load_config(given.config, given.overrides)
    schedule, ranks = Schedule.of(config, 1), given.ranks
    if config.batch_size % ranks:
        raise ConfigError(f"batch_size: {config.batch_size} samples cannot be shared by {ranks} ranks; set another")
    quiet = [
        "eval_freq=1e12",
        "save_ckpt_freq=1e12",
        "eval_samples=1",
        "eval_generate_samples=0",
        "log.tensorboard=false",
    ]
    common = ["--config", str(given.config), *given.overrides, *quiet, f"stop_after_steps={given.steps}"]
    speeds: dict[str, list[float]] = {"one": [], "ranks": []}
    with tempfile.TemporaryDirectory(prefix="m4-scaling-") as folder:
        for number in range(given.rounds):
            for name, processes in (("one", 1), ("ranks", ranks)):
                run = [
                    f"output_dir={folder}",
                    f"run_name={name}-{number}",
                    f"batch_size={config.batch_size // processes}",
                ]
                train([*common, *run], processes, ranks // processes)
                speeds[name].append(samples_per_second(Path(folder, f"{name}-{number}"), schedule.samples_per_step))
                print(f"{name} {number}: {speeds[name][-1]:.4g} samples/s", flush=True)
    one, many = (statistics.median(speeds[name]) for name in ("one", "ranks"))
    print(f"one process, {ranks} threads: {one:.4g} samples/s; {ranks} ranks: {many:.4g}, {many / one:.3f} of it")
    if given.out:
        write_figures(given.out, {"samples_per_s": speeds, "ratio": many / one})
    return 0


if __name__ == "__main__":
    run_command(main)
