"""Stages that run one after another, each within its time; one that fails does not stop those after it."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0  # of a stage's seconds: what it has, once interrupted, to write what it has
LEAST = 8.0  # seconds that a stage gets, however late it is
FINE = ("passed", "cut short")
TAIL = 30  # lines of a failed stage that the summary repeats


@dataclass(frozen=True)
class Stage:
    """One step of the session.

    Args:
        name: as the summary calls it.
        command: program and arguments, run in the repository's root.
        seconds: that are its own; `GRACE` before their end it is interrupted, at their end killed.
        most: where earlier stages took less than theirs, it may take what they left, up to so many in all.
        environment: variables besides the session's.
        optional: that time ended it before its end is no failure.
        otherwise: run in the time that is left where this one did not pass, so that those after it have something to
            run on; this one has failed all the same.
    """

    name: str
    command: Sequence[str]
    seconds: float
    most: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    optional: bool = False
    otherwise: "Stage | None" = None


@dataclass(frozen=True)
class Outcome:
    """How a stage went. status: "passed", "failed", "out of time", or where a stage is optional "cut short"."""

    name: str
    command: str
    status: str
    returncode: int
    seconds: float
    tail: list[str]


def run_stage(stage: Stage, log: Path) -> Outcome:
    """Run a stage; its output is shown as it comes and added to the log."""
    title = f"\n=== {stage.name} (at most {stage.seconds:.0f} s): {shlex.join(stage.command)}"
    print(title, flush=True)
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL)
    with open(log, "a") as file:
        file.write(f"{title}\n")
        file.flush()
        try:
            process = _start(stage)
        except OSError as error:  # the program is not there
            file.write(f"{error}\n")
            return Outcome(stage.name, shlex.join(stage.command), "failed", 127, 0.0, [str(error)])

        def copy() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                file.write(line)
                file.flush()
                tail.append(line.rstrip("\n").replace(str(ROOT), "."))  # results are committed

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        late = _wait(process, stage.seconds)
        reader.join(GRACE)
    too_late = "cut short" if stage.optional else "out of time"
    status = too_late if late else "passed" if process.returncode == 0 else "failed"
    seconds = time.monotonic() - start
    print(f"=== {stage.name}: {status}, {seconds:.1f} s", flush=True)
    return Outcome(stage.name, shlex.join(stage.command), status, process.returncode, round(seconds, 2), list(tail))


def _start(stage: Stage) -> subprocess.Popen:
    # A process group of its own, so that an interruption reaches its children and not us. It can be interrupted though
    # the session may run in a shell's background, whose processes begin with SIGINT ignored.
    return subprocess.Popen(
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


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Until it ends, is interrupted or killed; whether it was late."""
    late = False
    try:
        process.wait(max(seconds - GRACE, seconds / 2))
    except subprocess.TimeoutExpired:
        late = True
        _signal(process, signal.SIGINT)  # whatever it is then reports and saves what it has
        try:
            process.wait(min(GRACE, seconds / 2))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()
    finally:
        _signal(process, signal.SIGKILL)  # children that outlived it
    return late


def _signal(process: subprocess.Popen, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


def run_stages(stages: Sequence[Stage], log: Path, after: Callable[[list[Outcome]], None]) -> int:
    """Run all stages and say how they went; 1 if any did not pass, else 0.

    Args:
        log: the file that gets their output.
        after: called after each with the outcomes so far, since the machine may be taken away.
    """
    outcomes: list[Outcome] = []
    ahead, start, planned = deque(stages), time.monotonic(), 0.0
    while ahead:
        stage = ahead.popleft()
        saved = planned - (time.monotonic() - start)
        allowed = max(LEAST, min(max(stage.seconds, stage.most), stage.seconds + saved))
        outcome = run_stage(dataclasses.replace(stage, seconds=min(allowed, max(stage.seconds, stage.most))), log)
        outcomes.append(outcome)
        planned += stage.seconds
        left = stage.seconds - outcome.seconds
        if stage.otherwise is not None and outcome.status == "failed" and left > 0:
            instead = dataclasses.replace(stage.otherwise, seconds=min(stage.otherwise.seconds, left), most=0.0)
            planned -= instead.seconds  # they are of this one's
            ahead.appendleft(instead)
        try:
            after(outcomes)
        except Exception:  # what was found is in the records all the same
            traceback.print_exc()
    for line in lines_of(outcomes):
        print(line)
    return 0 if all(outcome.status in FINE for outcome in outcomes) else 1


def lines_of(outcomes: Sequence[Outcome]) -> list[str]:
    """How the stages went, and the last lines of those that did not pass."""
    lines = ["", "=== stages"]
    lines += [f"{outcome.status:<12} {outcome.seconds:7.1f} s  {outcome.name}" for outcome in outcomes]
    failed = [outcome for outcome in outcomes if outcome.status not in FINE]
    for outcome in failed:
        lines += [
            "",
            f"--- {outcome.name} {outcome.status} (status {outcome.returncode}); its last lines:",
            *outcome.tail,
        ]
    total = sum(outcome.seconds for outcome in outcomes)
    return [*lines, "", f"{len(outcomes) - len(failed)} of {len(outcomes)} stages passed in {total:.0f} s"]
