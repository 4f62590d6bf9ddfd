"""Kill a training run with SIGKILL at random moments, saves included, and see that it ends with the same bits.

``make torture``, or ``python -m tests.torture [--kills 50] [--seed 0] [--steps 40] [--folder DIR]``. A small run with
averaged weights saves after every step. It is killed, and started again by the same command, until it was killed often
enough; every second kill waits for a save to begin. Whenever a run comes to its end, its weights, averaged weights,
moments and losses are compared with those of a run that nobody disturbed, and a new one begins. Exit status 1 and a
line for what differs; 50 kills take some minutes on an idle core.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from m4.checkpoint import read_checkpoint, step_folders
from m4.run.metrics import read_metrics
from tests.runs import REPOSITORY, command, environment, write_config, write_tokens

STEP = 0.008  # millions of counted tokens
_START_SECONDS = 120.0  # for a process to come to its first new checkpoint
_MOST_DELAY = 0.05  # seconds between what a kill waits for and the kill; a save takes a few milliseconds


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description="Kill a training run at random moments."
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="m4-torture-", dir=arguments.folder) as folder:
        return torture(Path(folder), arguments.kills, arguments.steps, random.Random(arguments.seed))


def torture(folder: Path, kills: int, steps: int, chance: random.Random) -> int:
    """Returns the exit status."""
    for split, samples, seed in (("train", 11, 0), ("eval", 5, 1)):
        write_tokens(folder / "tokens", split, samples, seed)
    config = write_config(folder / "torture.yaml", folder / "tokens")
    undisturbed = _command(config, steps, "undisturbed")
    _run_to_the_end(undisturbed)
    expected = _result(folder, "undisturbed")
    done, runs, in_saves = 0, 0, 0
    while done < kills:
        name = f"run-{runs}"
        while done < kills and (killed := _kill_once(_command(config, steps, name), folder / "runs" / name, chance)):
            done += 1
            in_saves += killed == "in a save"
            print(f"kill {done} of {kills}: {killed}, at step {_newest(folder / 'runs' / name)}", flush=True)
        _run_to_the_end(_command(config, steps, name))
        differing = [what for what, value in _result(folder, name).items() if not _same(value, expected[what])]
        if differing:
            print(f"{name}: differs from the undisturbed run in {', '.join(differing)}")
            return 1
        runs += 1
    print(
        f"{kills} kills, {in_saves} of them in a save, over {runs} runs of {steps} steps: each ended with the same bits"
    )
    return 0


def _command(config: Path, steps: int, name: str) -> list[str]:
    keys = {
        "run_name": name,
        "total_tokens": steps * STEP,
        "save_ckpt_freq": STEP,
        "eval_freq": 5 * STEP,
        "eval_samples": 2,
        "eval_generate_samples": 0,
        "keep_ckpts": 2,
        "ema": 0.9,
    }
    return command("m4.train", "--config", config, *(f"{key}={value}" for key, value in keys.items()))


def _run_to_the_end(typed: list[str]) -> None:
    done = subprocess.run(typed, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(typed)} ended with {done.returncode}:\n{done.stderr}")
    if "damaged" in done.stderr:
        sys.exit(f"a checkpoint was not whole:\n{done.stderr}")


def _kill_once(typed: list[str], run_dir: Path, chance: random.Random) -> str | None:
    """Start it and kill it once it has got on; returns where it was, or None if it came to its end before that."""
    before, in_save = _newest(run_dir), chance.random() < 0.5
    process = subprocess.Popen(typed, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + _START_SECONDS
    try:
        while process.poll() is None and _newest(run_dir) == before:
            _wait(deadline, "no new checkpoint")
        while process.poll() is None and in_save and not _saving(run_dir):
            _wait(deadline, "no save", pause=0.0)
        time.sleep(0 if in_save else chance.uniform(0, _MOST_DELAY))
        if process.poll() is not None:
            if process.returncode != 0:
                sys.exit(f"{' '.join(typed)} ended with {process.returncode}")
            return None
        process.kill()
        process.wait()
        return "in a save" if _saving(run_dir) else "between saves"
    finally:
        process.kill()
        process.wait()


def _wait(deadline: float, what: str, pause: float = 0.002) -> None:
    if time.monotonic() > deadline:
        sys.exit(f"torture: {what} for {_START_SECONDS:g} s")
    time.sleep(pause)


def _newest(run_dir: Path) -> str:
    folders = step_folders(run_dir)
    return folders[-1].name if folders else "none"


def _saving(run_dir: Path) -> bool:
    """Whether a checkpoint is being written, or was when the run was killed."""
    return any((run_dir / "checkpoints").glob(".tmp-*"))


def _result(folder: Path, name: str) -> dict[str, object]:
    run_dir = folder / "runs" / name
    saved = read_checkpoint(step_folders(run_dir)[-1])
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    return {
        "step": saved.meta["step"],
        "weights": saved.weights,
        "averaged weights": saved.averaged,
        "moments": {f"{i}.{key}": value for i, one in saved.state["optimizer"]["state"].items()
                    for key, value in one.items()},
        "losses": [(line["step"], line["loss"], line["grad_norm"]) for line in lines],
    }  # fmt: skip


def _same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return a == b


if __name__ == "__main__":
    sys.exit(main())
