"""`python -m benchmarks.gpu`: the session; one of its stages; or what came back of a session put among the results."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

import torch

import m4kernels
from benchmarks.gpu import goals
from benchmarks.gpu.folder import KERNELS, LOG, RECORDS, SUMMARY, TAR, Folder, records_of
from benchmarks.gpu.runner import ROOT, Outcome, lines_of, run_stages
from benchmarks.gpu.session import collect, name_of, readme_rows, text_of
from benchmarks.gpu.stages import FUNCTIONS, run_function, stages_of
from benchmarks.results import COMMIT, commit, cpu_name, machine_name

FILES = (KERNELS, LOG, RECORDS, SUMMARY, TAR)
SESSION = re.compile(r"\d{8}-\d{6}-\d+-\w+\.json")


def about(gpu: bool) -> dict[str, object]:
    """What the records begin with."""
    now = datetime.now(timezone.utc)
    return {
        "time": now.isoformat(timespec="seconds"),
        "stamp": f"{now:%Y%m%d-%H%M%S-%f}",
        "machine": machine_name(),
        "environment": {
            "commit": commit(),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "simd": None,
            "gpu": torch.cuda.get_device_name() if gpu else None,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "m4kernels": m4kernels.__version__,
        },
    }


def session(out: Path, gpu: bool) -> int:
    """Run it; 1 if a stage did not pass."""
    folder = Folder(out)
    for left in (path for path in out.iterdir() if path.name in FILES or SESSION.fullmatch(path.name)):
        left.unlink()  # another session's, which must not be taken for this one's
    folder.append("session", **about(gpu))
    name = name_of(records_of(out))

    def keep(outcomes: Sequence[Outcome]) -> None:
        last = outcomes[-1]
        folder.append("stage", **{**vars(last), "stage": last.name})
        records = records_of(out)
        folder.write(name, text_of(records))
        folder.write(SUMMARY, "\n".join([*goals.lines(records), *lines_of(outcomes)]) + "\n")
        folder.pack()

    status = run_stages(stages_of(gpu, out), out / LOG, keep)
    print("\n".join(["", *goals.lines(records_of(out)), "", f"written to {out}"]))
    return status


def stop(signum: int, _frame: FrameType | None) -> None:
    """End the stage that runs, too: it is in a group of its own."""
    raise SystemExit(128 + signum)


def default_folder(gpu: bool) -> Path:
    return ROOT / "build" / ("gpu" if gpu else "gpu-rehearsal")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, even where there is a GPU")
    parser.add_argument(
        "--out", type=Path, help="the folder that everything goes to, at most seven files; default build/gpu, or "
        "build/gpu-rehearsal for a rehearsal",
    )  # fmt: skip
    parser.add_argument("--stage", choices=FUNCTIONS, help="only this stage; its records are added to the folder's")
    parser.add_argument(
        "--collect", type=Path, metavar="FOLDER_OR_TAR", help="put a session that came back among "
        "benchmarks/results/<machine>/, and print its goals and the README's rows",
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    if arguments.collect is not None:
        path, records = collect(arguments.collect), records_of(arguments.collect)
        print("\n".join([*goals.lines(records), "", *readme_rows(records), "", f"wrote {path}"]))
        return 0
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpu = torch.cuda.is_available()
    out = (arguments.out or default_folder(gpu)).resolve()
    if arguments.stage is not None:
        return run_function(arguments.stage, out)
    if not gpu:
        why = "rehearsal asked for" if arguments.dry_run else "no CUDA device"
        print(f"{why}: every stage is rehearsed on the CPU with small inputs; nothing here says how fast a GPU is")
    if commit() == "unknown":
        print(f"the commit is not known: no git here, and {COMMIT} is not set")
    signal.signal(signal.SIGTERM, stop)
    return session(out, gpu)


if __name__ == "__main__":
    sys.exit(main())
