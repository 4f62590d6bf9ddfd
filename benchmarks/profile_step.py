"""`python -m benchmarks.profile_step`: where the time of a CPU training step goes, part by part, beside its floor.

The step is the trainer's, on random tokens of the recipe; `--kernels auto,reference` takes it with the packed kernels
and with the padded reference, on the same samples. Every operator is timed where PyTorch calls it, in steps of their
own; what a plain step takes beyond all of them is calls, autograd and Python. A part's floor is its products at the
rate of the best float32 product at hand, or each of its tensors read and written once at the rate of copying, whichever
takes longer.

With one thread seconds are the thread's processor time, which other processes disturb little; with more they are the
clock's, for an idle machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import onednn
from benchmarks.profiled import PARTS, Profile, Rates, Row, Sizes
from benchmarks.results import write_figures
from benchmarks.steps import random_stores, use_kernels
from m4.arguments import CommandParser, whole
from m4.cli import run_command
from m4.config import TrainConfig, load_config
from m4.errors import ConfigError
from m4.model.config import KERNELS
from m4.model.flops import training_flop
from m4.training.trainer import Trainer
from m4kernels import _ext

WARM_UP, WARM_UP_S = 2, 3.0  # steps and seconds at least: the first two fault in the pages that later ones have at hand
Clock = Callable[[], float]


def clock_of(threads: int) -> Clock:
    """Seconds: of this thread alone where it works alone."""
    return time.thread_time if threads == 1 else time.perf_counter


def machine_rates(clock: Clock) -> dict[str, float]:
    """FLOP a second of each library's float32 product and of a loop of FMAs in registers, bytes a second of copying:
    the best of a few, of all threads."""
    size, threads = 2048, torch.get_num_threads()
    a, b = torch.randn(size, size), torch.randn(size, size)
    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    found = {
        "copying": 2 * source.nbytes / best(lambda: target.copy_(source), clock),
        "PyTorch float32": 2 * size**3 / best(lambda: torch.mm(a, b), clock),
    }
    if torch.backends.mkldnn.is_available():
        found["oneDNN float32"] = 2 * size**3 / best(lambda: onednn.product(a, b), clock)
    extension = _ext.load()
    if extension is not None:
        steps = 2**23
        done = extension.fma_loop(steps)
        found["FMAs in registers"] = threads * done / best(lambda: extension.fma_loop(steps), time.thread_time)
    return found


def best(run: Callable[[], Any], clock: Clock, times: int = 5) -> float:
    """Seconds of the fastest of some runs, after one that is not timed."""
    run()
    return min(seconds_of(run, clock) for _ in range(times))


def seconds_of(run: Callable[[], Any], clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def floor_rates(machine: dict[str, float]) -> Rates:
    """What floors are reckoned with: the fastest library's product."""
    return Rates(max(rate for name, rate in machine.items() if name.endswith("float32")), machine["copying"])


class Steps:
    """Steps of one trainer on one batch, plain and profiled in turns."""

    def __init__(self, config: TrainConfig, clock: Clock) -> None:
        self.trainer, self.clock = Trainer(config, stores=random_stores(config)), clock
        inputs = self.trainer.batches.step(0)
        self.counts = inputs.counts
        self.batches = [batch.masked for batch in inputs.micro_batches]

    def step(self, profile: Profile | None = None) -> None:
        step = self.trainer.step
        step.start(self.counts, self.trainer.config.lr)
        if profile is None:
            self._micro_batches()
            step.update()
        else:
            with profile:
                self._micro_batches()
                with profile.update():
                    step.update()
        step.release()

    def _micro_batches(self) -> None:
        for batch in self.batches:
            self.trainer.step.micro_batch(batch)

    def sizes(self) -> Sizes:
        halves = [half for batch in self.batches for half in (batch.encoder, batch.decoder)]
        padded = [half.segments.max_seqlen * half.segments.batch_size for half in halves]
        widths = frozenset(half.segments.max_seqlen for half in halves)
        tokens = frozenset(len(half.ids) for half in halves)
        return Sizes(tokens | frozenset(padded), widths, self.trainer.model.config.vocabulary)

    def flop(self) -> float:
        """By the usual convention (`m4.model.flops`)."""
        inputs = sum(len(batch.encoder.ids) for batch in self.batches)
        targets = torch.stack([batch.decoder.segments.counts.sum(0) for batch in self.batches]).sum(0)
        return training_flop(self.trainer.model.config, inputs, targets.tolist())

    def profile(self, kernels: str, steps: int, rates: Rates) -> dict[str, Any]:
        """The figures of one kind of step: medians of whole ones, means of operators."""
        use_kernels(self.trainer, kernels)
        done, warm = 0, 0.0
        while done < WARM_UP or warm < WARM_UP_S:
            done, warm = done + 1, warm + seconds_of(self.step, time.perf_counter)
        profile, plain = Profile(self.sizes(), self.clock), []
        for _ in range(steps):
            plain.append(seconds_of(self.step, self.clock))
            self.step(profile)
        whole_s = statistics.median(plain)
        rows = [_mean(row, steps) for row in profile.rows.values()]
        parts = {part: _sum((row for row in rows if row.part == part), rates) for part in PARTS}
        inside = sum(part["s"] for part in parts.values())
        floor = sum(part["floor_s"] for part in parts.values())
        parts["calls, autograd, Python"] = {"s": whole_s - inside, "floor_s": 0.0, "flop": 0.0, "calls": 0}
        dearest = sorted(rows, key=lambda row: -row.seconds)
        operators = [asdict(row) | {"floor_s": row.floor(rates)} for row in dearest]
        return {"step_s": whole_s, "floor_s": floor, "flop": self.flop(), "parts": parts, "operators": operators}


def _mean(row: Row, steps: int) -> Row:
    return Row(
        row.part, row.name, row.shapes, row.calls // steps, row.seconds / steps, row.flop / steps, row.bytes / steps
    )


def _sum(rows: Iterable[Row], rates: Rates) -> dict[str, float]:
    found = {"s": 0.0, "floor_s": 0.0, "flop": 0.0, "calls": 0}
    for row in rows:
        found["s"] += row.seconds
        found["floor_s"] += row.floor(rates)
        found["flop"] += row.flop
        found["calls"] += row.calls
    return found


def table(kernels: str, found: dict[str, Any], most: int) -> list[str]:
    """Lines for the terminal: parts, then the operators with the most time."""
    step_s, floor_s = found["step_s"], found["floor_s"]
    lines = [
        f"kernels: {kernels}; step {1e3 * step_s:.1f} ms, {step_s / floor_s:.2f} x the floor, {1e3 * floor_s:.1f} ms",
        f"{'part':<26} {'ms':>9} {'of step':>8} {'floor ms':>9} {'floor/ms':>9} {'GFLOP/s':>8} {'calls':>6}",
    ]
    for name, part in found["parts"].items():
        if part["s"]:
            lines.append(f"{name:<26} {_columns(part['s'], step_s, part['floor_s'], part['flop'])} {part['calls']:>6}")
    lines.append(f"the {most} dearest operators")
    for row in found["operators"][:most]:
        columns = _columns(row["seconds"], step_s, row["floor_s"], row["flop"])
        name = f"  {row['part']}: {row['name'].split('::')[1]}"
        lines.append(f"{name:<26.60} {columns} {row['calls']:>6}  {row['shapes']}")
    return lines


def _columns(seconds: float, whole_s: float, floor_s: float, flop: float) -> str:
    rate = f"{flop / seconds / 1e9:8.1f}" if flop else " " * 8
    return f"{1e3 * seconds:9.2f} {seconds / whole_s:8.1%} {1e3 * floor_s:9.2f} {floor_s / seconds:9.0%} {rate}"


def kernels_of(text: str) -> list[str]:
    """Of ``--kernels``."""
    names = text.split(",")
    for name in names:
        if name not in KERNELS:
            raise ConfigError(f"--kernels: expected some of {', '.join(KERNELS)}, divided by commas, got {name!r}")
    return names


def ratios_of(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far the packed step is ahead of each padded one; how far it would be if it took no longer than its floor; and
    how many times the floating-point operations the padded one does."""
    ours = found["auto"]
    ratios = {}
    for kernels, theirs in found.items():
        if kernels != "auto":
            ratios[f"{kernels} over auto"] = theirs["step_s"] / ours["step_s"]
            ratios[f"{kernels} over auto, at its floor"] = theirs["step_s"] / ours["floor_s"]
            flop = [sum(part["flop"] for part in one["parts"].values()) for one in (theirs, ours)]
            ratios[f"{kernels} over auto, FLOP"] = flop[0] / flop[1]
    return ratios


def main() -> int:
    parser = CommandParser(prog="python -m benchmarks.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("M4-tiny.yaml"), help="the recipe (default M4-tiny.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kernels", default="auto", help="auto (default), reference, reference-matmul, by commas")
    parser.add_argument("--threads", type=whole(1), default=1, help="of PyTorch and the kernels (default 1)")
    parser.add_argument("--steps", type=whole(1), default=3, help="of each kind, plain and profiled (default 3)")
    parser.add_argument("--rows", type=whole(0), default=20, help="operators that are printed (default 20)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_intermixed_args()
    kinds = kernels_of(arguments.kernels)
    ours = ["device=cpu", "run_name=profile", "data.mirror=false"]  # random tokens have no mirror image
    config, _ = load_config(arguments.config, [*arguments.overrides, *ours])
    torch.set_num_threads(arguments.threads)
    clock = clock_of(arguments.threads)
    machine = machine_rates(clock)
    rates = floor_rates(machine)
    print(
        f"{arguments.threads} threads; " + "; ".join(f"{name} {rate / 1e9:.1f} G/s" for name, rate in machine.items())
    )
    steps, found = Steps(config, clock), {}
    for kernels in kinds:
        found[kernels] = steps.profile(kernels, arguments.steps, rates)
        print(*table(kernels, found[kernels], arguments.rows), sep="\n", flush=True)
    ratios = ratios_of(found) if "auto" in found else {}
    for name, ratio in ratios.items():
        print(f"{name:<40} {ratio:.2f}")
    if arguments.out:
        write_figures(arguments.out, {"rates": machine, "ratios": ratios, "steps": found})
    return 0


if __name__ == "__main__":
    run_command(main)
