"""Programs that come with CUDA: compute-sanitizer over all of our kernels, hardware counters of some of them.

A machine that lacks one is told so; nothing here changes a setting of the card.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device import Unavailable
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.runner import ROOT

ONCE = (sys.executable, "-m", "benchmarks.gpu.once")
ERRORS = 7  # the status of compute-sanitizer where it found any
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
COUNTED = "whole_rows_kernel|grad_kv_kernel|forward_kernel"
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


def program(name: str) -> str:
    """Its path. Raises Unavailable."""
    homes = [Path(os.environ.get(variable, "")) / "bin" for variable in ("CUDA_HOME", "CUDA_PATH")]
    homes += [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, homes)))
    if found is None:
        raise Unavailable(f"{name} is not on this machine")
    return found


def watched(command: Sequence[str], **environment: str) -> tuple[int, list[str]]:
    """Run a program; its output is shown as it comes. Returns its status and its lines."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line.rstrip("\n"))
    return process.wait(), lines


def sanitize(folder: Folder, tool: str) -> None:
    """Run every kernel of ours under a tool of compute-sanitizer; what it finds raises."""
    command = [program("compute-sanitizer"), "--tool", tool, "--error-exitcode", str(ERRORS)]
    # Each tensor an allocation of its own, so that a step beyond one is seen.
    status, lines = watched([*command, *ONCE], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summaries = [int(match[1]) for match in map(SUMMARY.search, lines) if match]
    folder.append("sanitizer", tool=tool, errors=summaries[-1] if summaries else None, status=status, last=lines[-20:])
    if not summaries:
        raise RuntimeError(f"{tool} ended with status {status} and no summary")
    if status or summaries[-1]:
        first = next((line for line in lines if line.startswith("=========") and "SANITIZER" not in line), "")
        raise AssertionError(f"{tool} found {summaries[-1]} errors, status {status}; first: {first}")


def rows_of(lines: Sequence[str]) -> list[dict[str, str]]:
    """The table of `ncu --csv --page raw` among a program's lines: a row a kernel, units behind the numbers."""
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    header, units, *rows = csv.reader(line for line in lines[start:] if line.startswith('"'))
    return [
        {name: f"{value} {unit}".strip() for name, unit, value in zip(header, units, row, strict=False)} for row in rows
    ]


def count(folder: Folder) -> None:
    """Hardware counters of kernels of attention and of the loss, at M4's shapes."""
    command = [program("ncu"), "--clock-control", "none", "--target-processes", "application-only", "--csv"]
    command += ["--page", "raw", "--kernel-name", f"regex:{COUNTED}", "--launch-count", "3"]
    for what in (["--metrics", ",".join(METRICS)], ["--section", "SpeedOfLight"]):  # where a metric is not known
        status, lines = watched([*command, *what, *ONCE, "--large"])
        rows = rows_of(lines)
        for row in rows:
            kept = {name: value for name, value in row.items() if name in METRICS or "Throughput" in name}
            folder.append("counters", kernel=row.get("Kernel Name", ""), **({"values": kept or row}))
            print(row.get("Kernel Name", ""), kept or row, flush=True)
        if rows:
            return
    raise RuntimeError(f"ncu ended with status {status} and counted nothing")


def memcheck(folder: Folder) -> None:
    """The stage "memcheck"."""
    with folder.part("memcheck"):
        sanitize(folder, "memcheck")


def racecheck(folder: Folder) -> None:
    """The stage "racecheck"."""
    with folder.part("racecheck"):
        sanitize(folder, "racecheck")


def counters(folder: Folder) -> None:
    """The stage "counters"."""
    with folder.part("counters"):
        count(folder)
