"""Kill a training run with SIGKILL at random moments, saves included, and see that it ends with the same bits.

``make torture``, or ``python -m tests.torture [--kills 50] [--ranks 1] [--seed 0] [--steps 12] [--folder DIR]``. A
small run with averaged weights saves after every step. It is killed, and started again by the same command, until it
was killed often enough; every second kill waits for a save to begin. Of several ranks one is killed, at random; the
others are killed as torchrun would, or one time in five left to end by themselves, with status 2. Whenever a run
comes to its end, its weights, averaged weights, moments and losses are compared with those of a run that nobody
disturbed, and a new one begins. Exit status 1 and a line for what differs, or for a checkpoint that was not whole.

A process is a fork of this one, which has imported everything and started no thread: a kill costs no start of Python
and torch.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

from m4.checkpoint import read_checkpoint, step_folders
from m4.cli import run_command
from m4.run.metrics import read_metrics
from m4.train import main as train
from tests.runs import write_config, write_tokens

STEP = 0.008  # millions of counted tokens
_MOST_SECONDS = 120.0  # for whatever is waited for
_MOST_DELAY = 0.05  # seconds between what a kill waits for and the kill; a save takes a few milliseconds
_FAILED = 2  # the status of a rank whose peer is gone
_LEFT_ALONE = 0.2  # of the kills of a rank, the share after which the others end by themselves


class Process:
    """``python -m m4.train arguments`` in a fork of this process; what it says goes to a file."""

    def __init__(self, arguments: list[str], said: Path, variables: dict[str, str]) -> None:
        self.said, self.status = said, None
        said.touch()
        self.pid = os.fork()
        if self.pid == 0:
            self._train(arguments, variables)

    def _train(self, arguments: list[str], variables: dict[str, str]) -> None:
        status = 1
        try:
            out = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.update(variables)
            sys.argv = ["m4.train", *arguments]
            run_command(train)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(status)  # nothing of the parent's is run here

    def ended(self) -> bool:
        """Whether it has come to an end; `status` then is its exit status, negative for a signal."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def kill(self) -> None:
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait(self) -> None:
        deadline = time.monotonic() + _MOST_SECONDS
        while not self.ended():
            _pause(deadline, "no end of a run", self)


class Torture:
    """Runs of one configuration in a folder, with one process or several ranks."""

    def __init__(self, folder: Path, steps: int, ranks: int, chance: random.Random) -> None:
        self.folder, self.steps, self.ranks, self.chance = folder, steps, ranks, chance
        for split, samples, seed in (("train", 11, 0), ("eval", 5, 1)):
            write_tokens(folder / "tokens", split, samples, seed)
        self.config = write_config(folder / "torture.yaml", folder / "tokens")
        self.starts = 0

    def kills(self, count: int) -> int:
        """Kill so many times; returns the exit status."""
        self.run_to_the_end("undisturbed")
        expected = self.result("undisturbed")
        done, runs, in_saves, start = 0, 0, 0, time.monotonic()
        while done < count:
            name = f"run-{runs}"
            while done < count and (killed := self.kill_once(name)):
                done += 1
                in_saves += "in a save" in killed
                print(f"kill {done} of {count}: {killed}, at step {self.newest(name)}", flush=True)
            self.run_to_the_end(name)
            differing = [what for what, value in self.result(name).items() if not _same(value, expected[what])]
            if differing:
                print(f"{name}: differs from the undisturbed run in {', '.join(differing)}")
                return 1
            runs += 1
        print(
            f"{count} kills, {in_saves} of them in a save, over {runs} runs of {self.steps} steps, {self.ranks} process"
            f"{'es' if self.ranks > 1 else ''}, in {time.monotonic() - start:.0f} s: each ended with the same bits"
        )
        return 0

    def start(self, name: str) -> list[Process]:
        """The processes of a run, one a rank."""
        keys = {
            "run_name": name,
            "total_tokens": self.steps * STEP,
            "batch_size": 4 // self.ranks,
            "save_ckpt_freq": STEP,
            "eval_freq": 5 * STEP,
            "eval_samples": 2,
            "eval_generate_samples": 0,
            "keep_ckpts": 2,
            "ema": 0.9,
            "rank_timeout": 60,
        }
        arguments = ["--config", str(self.config), *(f"{key}={value}" for key, value in keys.items())]
        world = {"WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": _free_port()}
        started = []
        for rank in range(self.ranks):
            variables = {key: str(value) for key, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
            said = self.folder / f"{self.starts}.{rank}.said"
            started.append(Process(arguments, said, variables if self.ranks > 1 else {}))
        self.starts += 1
        return started

    def run_to_the_end(self, name: str) -> None:
        processes = self.start(name)
        try:
            for process in processes:
                process.wait()
        finally:
            self.end(processes)
        self.expect(processes, 0)

    def kill_once(self, name: str) -> str | None:
        """Start it and kill it once it has got on; returns what was killed, None if it came to its end before that."""
        before, in_save, deadline = self.newest(name), self.chance.random() < 0.5, time.monotonic() + _MOST_SECONDS
        processes = self.start(name)
        rank = self.chance.randrange(self.ranks)
        try:
            while not processes[rank].ended() and self.newest(name) == before:
                _pause(deadline, "no new checkpoint", processes[0])
            while not processes[rank].ended() and in_save and not self.saving(name):
                _pause(deadline, "no save", processes[0], seconds=0.0005)
            time.sleep(0 if in_save else self.chance.uniform(0, _MOST_DELAY))
            if processes[rank].ended():
                for process in processes:
                    process.wait()
                self.expect(processes, 0)
                return None
            processes[rank].kill()
            where = "in a save" if self.saving(name) else "between saves"
            others = processes[:rank] + processes[rank + 1 :]
            alone = bool(others) and self.chance.random() < _LEFT_ALONE
            for process in others if alone else []:
                process.wait()
            # One that was at its end has nothing left to ask of the one that is dead.
            self.expect(others if alone else [], _FAILED, 0)
        finally:
            self.end(processes)
        who = f"rank {rank}, the others ended by themselves, " if alone else f"rank {rank}, " if others else ""
        return f"{who}{where}"

    def end(self, processes: list[Process]) -> None:
        """Let none be left, and none have found a checkpoint that was not whole."""
        for process in processes:
            process.kill()
        for process in processes:
            if "damaged" in process.said.read_text():
                sys.exit(f"a checkpoint was not whole:\n{process.said.read_text()}")

    def expect(self, processes: list[Process], *statuses: int) -> None:
        for process in processes:
            if process.status not in statuses:
                sys.exit(f"a process ended with {process.status}, not {statuses}:\n{process.said.read_text()}")

    def newest(self, name: str) -> str:
        folders = step_folders(self.folder / "runs" / name)
        return folders[-1].name if folders else "none"

    def saving(self, name: str) -> bool:
        """Whether a checkpoint is being written, or was when the run was killed."""
        return any((self.folder / "runs" / name / "checkpoints").glob(".tmp-*"))

    def result(self, name: str) -> dict[str, object]:
        run_dir = self.folder / "runs" / name
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


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def _pause(deadline: float, what: str, process: Process, seconds: float = 0.01) -> None:
    if time.monotonic() > deadline:
        sys.exit(f"torture: {what} for {_MOST_SECONDS:g} s:\n{process.said.read_text()}")
    time.sleep(seconds)


def _same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return a == b


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description="Kill a training run at random moments."
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4), help="processes of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=12, help="of a run")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="m4-torture-", dir=arguments.folder) as folder:
        chance = random.Random(arguments.seed)
        return Torture(Path(folder), arguments.steps, arguments.ranks, chance).kills(arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
