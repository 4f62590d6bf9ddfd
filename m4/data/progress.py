"""The progress bar of long commands."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(what: str, videos: int, show: bool = True) -> tqdm:
    """A bar over ``videos`` videos on stderr; in a log file it is renewed only now and then."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=videos, desc=what, unit="video", disable=not (show and videos), mininterval=interval)
