"""What every command shares: log lines on stderr, and one line in place of a traceback for what a user can mend."""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NoReturn, TextIO

from m4.bars import tqdm
from m4.device import out_of_memory
from m4.run.signals import Interrupted

# How torch words a GPU or driver that cannot be used at all. What a kernel does wrong afterwards is a bug of ours.
_CUDA_START = re.compile(
    r"no NVIDIA driver|NVIDIA driver on your system|CUDA driver (initialization|version)|CUDA unknown error|"
    r"no CUDA-capable device|CUDA-capable device\(s\) is/are busy|device is busy or unavailable|"
    r"not compiled with CUDA|invalid device ordinal|no kernel image is available",
    re.IGNORECASE,
)

# What our own texts use beyond ASCII, for terminals and logs that cannot show it; anything else becomes \u….
_PLAIN = str.maketrans(
    {"…": "...", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "±": "+-", "·": "."}
    | {"\N{EN DASH}": "-", "\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "x"}
    | dict(zip("▁▂▃▄▅▆▇█", ".:-=+*#@", strict=True))
)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status; see `exit_status` for what becomes of errors."""
    _make_streams_safe()
    root = logging.getLogger()
    root.addHandler(_ConsoleHandler())
    root.setLevel(logging.WARNING)
    for ours in ("m4", "m4kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)
    sys.exit(exit_status(main))


def exit_status(main: Callable[[], int]) -> int:
    """What ``main`` returns, or the status of what ended it.

    What a user can mend (bad arguments, files and data, a full disk, too little memory, a GPU that cannot be used,
    workers that died) becomes one line ``error: …`` on stderr and 2; ``M4_TRACEBACK=1`` shows the traceback above it.
    Ctrl-C is 130, a reader of our output that has gone (``| head``) is 1. Anything else is a bug of ours, and raised.
    """
    try:
        status = main()
        sys.stdout.flush()  # a full disk or a reader that has gone is seen here, and not at exit
        return status
    except BrokenPipeError:
        _discard_output()
        return 1
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to continue")
        return 130
    except Interrupted as interrupted:  # before or after the part of a run that has something to save
        return interrupted.exit_status
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        if os.environ.get("M4_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        _say(f"error: {' '.join(line.split()) or type(error).__name__}")
        _discard_output()
        return 2


def error_line(error: BaseException) -> str | None:
    """What to tell the user of an error that is not a bug of ours; None if it is one."""
    if isinstance(error, BrokenProcessPool):
        return f"a worker process died ({error}); free some memory or lower --workers, and run this again"
    if out_of_memory(error):
        said = str(error).strip().splitlines()
        return f"out of memory{f' ({said[0]})' if said else ''}; use smaller batches, fewer workers or another device"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, RuntimeError) and _CUDA_START.search(str(error)):
        return f"device: the GPU cannot be used: {str(error).splitlines()[0]}; use device cpu, or mend the driver"
    return None


class _ConsoleHandler(logging.Handler):
    """Writes a line above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(f"{prefix}{record.getMessage()}", file=sys.stderr)


class _Output(io.TextIOWrapper):
    """Standard output in any encoding; an error says that it is about it, which a full disk does not."""

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(
            stream.detach(),
            encoding=stream.encoding,
            errors="m4.plain",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        with _named("standard output"):
            return super().write(text)

    def flush(self) -> None:
        with _named("standard output"):
            super().flush()


@contextmanager
def _named(place: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, place) from error


def _make_streams_safe() -> None:
    """Output in any encoding, and to streams that the caller has closed (``>&-``), is no reason to fail."""
    codecs.register_error("m4.plain", _plain)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Output(sys.stdout)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="m4.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _say(line: str) -> None:
    """One line on stderr, if anyone reads it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard_output() -> None:
    """Write what is left of our output, or give it up where that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Send to nowhere what a stream still holds; Python would complain about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def python_command() -> str:
    """How to type the running interpreter: ``python`` where that is it, else its path, as in .venv/bin/python."""
    found, running = shutil.which("python"), os.path.abspath(sys.executable)
    if found is not None and os.path.abspath(found) == running:
        return "python"
    return os.path.relpath(running) if running.startswith(os.getcwd() + os.sep) else running
