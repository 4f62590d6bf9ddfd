"""What a benchmark session measured, where, and with what: printed, and saved as JSON when asked."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch

import m4kernels
from benchmarks import guard
from benchmarks.measure import Work, copy_bandwidth, product_rate, product_rates
from m4.files import write_atomically
from m4kernels import _ext

RESULTS = Path(__file__).with_name("results")
COMMIT = "M4KERNELS_COMMIT"  # names the commit of a copy of the sources without git


@dataclass(frozen=True)
class Record:
    """One provider on one case."""

    op: str
    case: str
    provider: str
    seconds: float  # median
    rounds: int
    rate: str
    work: str  # formula of the amount that the rate counts
    share_of_floor: float
    peak_extra_bytes: int

    @staticmethod
    def of(op: str, case: str, provider: str, seconds: float, rounds: int, work: Work, peak: int) -> "Record":
        share = work.share_of_floor(seconds)
        return Record(op, case, provider, seconds, rounds, work.rate(seconds), work.formula, share, peak)


@dataclass
class Session:
    """Everything measured in one run of pytest."""

    records: list[Record] = field(default_factory=list)
    speedups: dict[str, float] = field(default_factory=dict)
    keep: Callable[..., None] | None = None  # called with the kind and the values of each figure at once

    def add(self, record: Record) -> None:
        """Add what one provider took."""
        self.records.append(record)
        if self.keep is not None:
            self.keep("time", **asdict(record))

    def add_speedup(self, name: str, value: float) -> None:
        """Add a kernel's speed-up over a baseline."""
        self.speedups[name] = value
        if self.keep is not None:
            self.keep("speedup", name=name, value=value)

    def table(self) -> list[str]:
        """Lines for the terminal."""
        lines = [f"{'op, case':<56} {'provider':<24} {'median':>10} {'rate':>16} {'of floor':>9} {'extra MiB':>10}"]
        for r in self.records:
            lines.append(
                f"{f'{r.op}, {r.case}':<56} {r.provider:<24} {readable(r.seconds):>10} {r.rate:>16} "
                f"{r.share_of_floor:>8.0%} {r.peak_extra_bytes / 2**20:>10.1f}"
            )
        if self.records:
            rates = "; ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in product_rates().items())
            lines.append(f"the floor's rates here: copying {copy_bandwidth() / 1e9:.1f} GB/s; products: {rates}")
        floors = guard.load()
        for name, value in self.speedups.items():
            lines.append(f"{name:<82} {value:6.2f}x" + (f"   floor {floors[name]}x" if name in floors else ""))
        for formula in dict.fromkeys(f"{r.op}: {r.work}" for r in self.records):
            lines.append(formula)
        return lines

    def save(self, root: Path = RESULTS) -> Path:
        """Write the session to `<root>/<machine>/<time>-<commit>.json`, a new file each time."""
        now = datetime.now(timezone.utc)
        where = environment()
        folder = root / machine_name()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{now:%Y%m%d-%H%M%S-%f}-{where['commit'][:7]}.json"
        body = {
            "time": now.isoformat(timespec="seconds"),
            "environment": where,
            "records": [asdict(record) for record in self.records],
            "speedups": self.speedups,
        }
        path.write_text(json.dumps(body, indent=1) + "\n")
        return path


def readable(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine_name() -> str:
    """A folder name: the CPU, its threads in use, the GPU if there is one; on a CPU the SIMD level where it is below
    AVX-512, which a hypervisor may hide while the name stays."""
    parts = [cpu_name(), f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    elif (level := simd_level()) is not None and not level.startswith("avx512"):
        parts.append(level)
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def simd_level() -> str | None:
    """The extension's; None without an extension."""
    extension = _ext.load()
    return None if extension is None else extension.simd_level()


def environment() -> dict[str, Any]:
    """`machine`, and how fast it copies and multiplies, which is measured."""
    return {
        **machine(),
        "copy_gigabytes_per_second": copy_bandwidth() / 1e9,
        "product_gigaflops": product_rate() / 1e9,
        "products_gigaflops": {name: rate / 1e9 for name, rate in product_rates().items()},
    }


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """What a script has measured, as JSON, with its arguments and the machine."""
    body = {"command": sys.argv[1:], "environment": machine(), **figures}
    write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())


def machine() -> dict[str, Any]:
    """Where this runs, on what source and versions."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit(),
        "uncommitted_changes": None if changes is None else bool(changes),  # None: not known
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "simd": simd_level(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "m4kernels": m4kernels.__version__,
        "platform": platform.platform(),
    }


def commit() -> str:
    """Of the sources: what `COMMIT` names, else what git says, else "unknown"."""
    return os.environ.get(COMMIT, "").strip() or git("rev-parse", "HEAD") or "unknown"


def git(*arguments: str) -> str | None:
    """What git says of the sources; None where there is no git, or they are no repository of its."""
    try:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
