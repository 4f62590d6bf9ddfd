"""`make gpu`: prove and measure everything on a GPU in under ten minutes, from a bare checkout and without network.

Stages run one after another, each within its time; a stage that fails does not stop those after it, and the exit status
says whether any failed. Where there is no GPU the same stages are rehearsed on the CPU with small inputs, so that what
can break there does not break for the first time on the machine that matters.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds that a stage has, once interrupted, to write what it has
TAIL = 30  # lines of a failed stage that the summary repeats


@dataclass(frozen=True)
class Stage:
    """One step of the session.

    Args:
        name: as the summary calls it.
        command: program and arguments, run in the repository's root.
        seconds: after which it is interrupted, and after `GRACE` more killed.
        environment: variables besides the session's.
        otherwise: run in the time that is left where this one did not pass, so that those after it have something to
            run on; this one has failed all the same.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    otherwise: "Stage | None" = None


@dataclass(frozen=True)
class Outcome:
    """How a stage went. status: "passed", "failed" or "out of time"."""

    name: str
    command: str
    status: str
    returncode: int
    seconds: float
    tail: list[str]


def run_stage(stage: Stage, log_dir: Path) -> Outcome:
    """Run a stage; its output is shown as it comes and written to `<log_dir>/<name>.log`."""
    print(f"\n=== {stage.name} (at most {stage.seconds:.0f} s): {shlex.join(stage.command)}", flush=True)
    start = time.monotonic()
    # A process group of its own, so that an interruption reaches its children and not us. It can be interrupted though
    # the session may run in a shell's background, whose processes begin with SIGINT ignored.
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    tail: deque[str] = deque(maxlen=TAIL)

    def copy() -> None:
        assert process.stdout is not None
        with open(log_dir / f"{stage.name.replace(' ', '-')}.log", "w") as log:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                log.write(line)
                log.flush()
                tail.append(line.rstrip("\n"))

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(stage.seconds)
    except subprocess.TimeoutExpired:
        late = True
        _signal(process, signal.SIGINT)  # pytest then reports and saves what it has
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()
    finally:
        _signal(process, signal.SIGKILL)  # children that outlived it
    reader.join(GRACE)
    status = "out of time" if late else "passed" if process.returncode == 0 else "failed"
    seconds = time.monotonic() - start
    print(f"=== {stage.name}: {status}, {seconds:.1f} s", flush=True)
    return Outcome(stage.name, shlex.join(stage.command), status, process.returncode, round(seconds, 2), list(tail))


def _signal(process: subprocess.Popen, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def run_session(stages: Sequence[Stage], out: Path, facts: Mapping[str, object]) -> int:
    """Run all stages, print the summary, write `<out>/stages-<time>.json`; 1 if any stage did not pass, else 0."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    path = out / f"stages-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}.json"
    ahead = deque(stages)
    while ahead:
        stage = ahead.popleft()
        try:
            outcomes.append(run_stage(stage, logs))
        except OSError as error:  # the program is not there
            outcomes.append(Outcome(stage.name, shlex.join(stage.command), "failed", 127, 0.0, [str(error)]))
        left = stage.seconds - outcomes[-1].seconds
        if stage.otherwise is not None and outcomes[-1].status == "failed" and left > 0:
            ahead.appendleft(dataclasses.replace(stage.otherwise, seconds=min(stage.otherwise.seconds, left)))
        body = {**facts, "stages": [dataclasses.asdict(outcome) for outcome in outcomes]}
        path.write_text(json.dumps(body, indent=1) + "\n")  # after every stage: the machine may be taken away
    print("\n=== summary")
    for outcome in outcomes:
        print(f"{outcome.status:<12} {outcome.seconds:7.1f} s  {outcome.name}")
    failed = [outcome for outcome in outcomes if outcome.status != "passed"]
    for outcome in failed:
        print(f"\n--- {outcome.name} {outcome.status} (status {outcome.returncode}); its last lines:")
        print("\n".join(outcome.tail))
    total = sum(outcome.seconds for outcome in outcomes)
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} stages passed in {total:.0f} s; written to {path}")
    return 1 if failed else 0


def stages_of(gpu: bool, out: Path, python: str = sys.executable) -> list[Stage]:
    """The session: on a GPU ten minutes at most; without one its rehearsal."""
    pytest = (python, "-m", "pytest", "-p", "no:cacheprovider")
    save = ("--save-results", "--results-dir", str(out))
    bench = (*pytest, "-q", "benchmarks", *save)
    pip = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index")
    offline = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    repeats = "tests/ops/test_repeats.py"
    step, step_on_cpu = "tests/training/test_step_cuda.py", "tests/training/test_step.py"
    if not gpu:
        small = "test_time and (sample or small) and cpp and not training_step"
        return [
            Stage("build", (*pip, "--dry-run", "-e", "."), 120, offline),
            Stage("report", (python, "-m", "m4kernels"), 60),
            Stage("repeats and masks", (*pytest, "-q", repeats), 120),
            # Collected in whole, so that a broken import or mark shows; without a GPU all of them are skipped.
            Stage("cuda tests", (*pytest, "-q", "-m", "cuda", "tests"), 120),
            Stage("training step", (*pytest, "-q", step_on_cpu, "-k", "recorded or nothing_reads"), 120),
            Stage("op benchmarks", (*bench, "-k", small), 120),
            Stage("step benchmarks", (*pytest, "-q", "tests/test_gpu_session.py", "-k", "step"), 120),
            Stage("plots", (python, "-m", "benchmarks.plot", "--folder", str(out)), 60),
        ]
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    build = {"M4KERNELS_CUDA": "1", "M4KERNELS_CUDA_ARCHS": arch, **offline}
    # Without nvcc, or with one that does not take the sources, Triton's kernels and those of the CPU still run.
    without = Stage("build without CUDA", (*pip, "-e", "."), 110, {"M4KERNELS_CUDA": "0", **offline})
    return [
        Stage("build", (*pip, "-e", "."), 110, build, otherwise=without),
        Stage("report", (python, "-m", "m4kernels"), 15),
        Stage("repeats and masks", (*pytest, "-q", "-m", "cuda", repeats), 50),
        Stage("training step", (*pytest, "-q", "-m", "cuda", step), 75),
        Stage("cuda tests", (*pytest, "-q", "-m", "cuda", "tests", f"--ignore={repeats}", f"--ignore={step}"), 75),
        Stage("step benchmarks", (*bench, "-k", "training_step and not compiled"), 60),
        Stage("op benchmarks", (*bench, "-k", "not training_step and not compiled and not Flex"), 90),
        # Last, for compiling may take the time of everything else; what was measured until then is saved.
        Stage("compiled benchmarks", (*bench, "-k", "compiled or Flex"), 100),
        Stage("plots", (python, "-m", "benchmarks.plot", "--folder", str(out)), 20),
    ]


def main() -> int:
    from benchmarks.results import RESULTS, commit, machine_name

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, even where there is a GPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results, or build/gpu-rehearsal for a rehearsal")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpu = torch.cuda.is_available()
    if not gpu:
        why = "rehearsal asked for" if arguments.dry_run else "no CUDA device"
        print(f"{why}: every stage is rehearsed on the CPU with small inputs; nothing here says how fast a GPU is")
    root = (arguments.out or (RESULTS if gpu else ROOT / "build" / "gpu-rehearsal")).resolve()
    facts = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "commit": commit(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    return run_session(stages_of(gpu, root), root / machine_name(), facts)


if __name__ == "__main__":
    sys.exit(main())
