"""What every command shares: log lines on stderr, and one line instead of a traceback for a user's mistake."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

from m4.run.signals import Interrupted


class _ConsoleHandler(logging.Handler):
    """Writes a line above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(f"{prefix}{record.getMessage()}", file=sys.stderr)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status; ValueError and OSError become ``error: …`` and status 2.

    ``M4_TRACEBACK=1`` shows the traceback, for a bug report.
    """
    root = logging.getLogger()
    root.addHandler(_ConsoleHandler())
    root.setLevel(logging.WARNING)
    for ours in ("m4", "m4kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (ValueError, OSError) as error:
        if os.environ.get("M4_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except Interrupted as interrupted:  # before or after the part of a run that has something to save
        status = interrupted.exit_status
    sys.exit(status)
