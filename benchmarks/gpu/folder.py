"""The folder that a session writes: few files with plain names, whole at any moment.

`records.jsonl` holds all that was found, a record a line, appended at once; the other files follow from it, but for the
log. `session.tar` has all of them.
"""

import contextlib
import gc
import json
import os
import tarfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import ON_GPU, Unavailable
from benchmarks.results import Record
from m4.files import write_atomically

RECORDS, LOG, SUMMARY, KERNELS, TAR = "records.jsonl", "log.txt", "summary.txt", "kernels.txt", "session.tar"


class Folder:
    """Where a session keeps what it finds.

    Args:
        path: the folder; made if it is not there.
        stage: whose records these are.
    """

    def __init__(self, path: Path, stage: str = "session") -> None:
        self.path, self.stage = path, stage
        self.failures: list[str] = []
        path.mkdir(parents=True, exist_ok=True)

    def append(self, kind: str, **values: Any) -> None:
        """Add a record; it is on the disk when this returns."""
        line = json.dumps({"kind": kind, "stage": self.stage, **values}, default=str) + "\n"
        with open(self.path / RECORDS, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def time(self, record: Record) -> None:
        """Add what one provider took on one case."""
        self.append("time", **vars(record))

    def say(self, text: str) -> None:
        """Add to the tables of kernels, and show it."""
        print(text, flush=True)
        with open(self.path / KERNELS, "a") as file:
            file.write(text + "\n")

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A part of a stage: that it fails is recorded, and does not stop the others; nor that something is absent."""
        try:
            yield
        except Unavailable as reason:
            print(f"{what}: not here: {reason}", flush=True)
            self.append("absent", what=what, why=str(reason))
        except Exception as error:
            traceback.print_exc()
            self.failures.append(what)
            self.append("failure", what=what, error=f"{type(error).__name__}: {error}"[:2000])
        finally:
            gc.collect()
            if ON_GPU:
                with contextlib.suppress(RuntimeError):  # the GPU may be lost to this process
                    torch.cuda.empty_cache()

    def pack(self) -> Path:
        """Renew the tar of all other files."""
        path = self.path / TAR
        unfinished = path.with_suffix(".part")
        with tarfile.open(unfinished, "w") as tar:
            for file in sorted(self.path.iterdir()):
                if file.is_file() and file not in (path, unfinished):
                    tar.add(file, file.name)
        unfinished.replace(path)
        return path

    def write(self, name: str, text: str) -> None:
        """Write a file anew; whoever looks meanwhile sees the old one or the new one."""
        write_atomically(self.path / name, text.encode())


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records of a session's folder, or of its tar. The last line may have been cut off: then it is left out.

    Raises:
        SystemExit: there are none, or another line is no record.
    """
    if path.is_dir():
        path = path / RECORDS
    try:
        text = _of_tar(path) if path.suffix == ".tar" else path.read_text()
    except (OSError, KeyError, tarfile.TarError) as error:
        raise SystemExit(f"{path}: no records of a GPU session ({error}): expected {RECORDS} or {TAR} of one") from None
    *whole, last = text.split("\n")
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise SystemExit(f"{path}: line {number} of the records is no JSON: it was damaged") from None
    with contextlib.suppress(ValueError):
        records.append(json.loads(last))
    return records


def _of_tar(path: Path) -> str:
    with tarfile.open(path) as tar:
        file = tar.extractfile(RECORDS)
        assert file is not None
        return file.read().decode()
