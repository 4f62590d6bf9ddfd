"""The embedded sample set as training sees it: a folder that a process of its own makes, if it is not there yet.

Of its own, so that training never loads the code that makes data (`m4.data.preparation.sample`).
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from m4.errors import DataError


def make_sample_set(root: Path, videos: int) -> Path:
    """Make the sample set in ``root`` with ``python -m m4.data sample``, or find it finished there.

    Raises DataError if that command fails, which has said why on stderr.
    """
    done = subprocess.run([sys.executable, "-m", *_arguments(root, videos)], stdout=_standard_error())
    if done.returncode != 0:
        raise DataError(f"data.sample_dir: {sample_command(root, videos)} ended with status {done.returncode}")
    return root


def _standard_error() -> int:
    """Where a process may write to; in some notebooks sys.stderr is no file, and it is what the kernel started with."""
    try:
        return sys.stderr.fileno()
    except OSError:
        return 2


def sample_command(root: Path, videos: int) -> str:
    """What makes the sample set, to be typed into a shell."""
    return shlex.join(["python", "-m", *_arguments(root, videos)])


def _arguments(root: Path, videos: int) -> list[str]:
    return ["m4.data", "sample", "--out", str(root), "--videos", str(videos)]
