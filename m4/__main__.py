"""The console script: ``m4 train``, ``m4 data``, … are short for ``python -m m4.train``, ``python -m m4.data``, ….

Only the command that is asked for is imported, so that ``m4 --help`` does not wait for PyTorch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from m4.extras import MissingExtra

# Name → (module that is run, what it does).
COMMANDS = {
    "train": ("m4.train", "train a model, or resume where it stopped"),
    "data": ("m4.data.__main__", "make, look at, split and pack training data"),
    "evaluate": ("m4.evaluate", "how well a run predicts a split, beside unigrams and copying"),
    "generate": ("m4.generate", "fill in modalities from others, roll motions out"),
    "plots": ("m4.plots", "loss curves, masks, attention and schedule as pictures"),
    "kernels": ("m4kernels.__main__", "which kernels run here: the report for bug reports"),
}
_WIDTH = max(map(len, COMMANDS))


def usage() -> str:
    """What ``m4 --help`` prints."""
    lines = (f"  {name:<{_WIDTH}}  {what}" for name, (_, what) in COMMANDS.items())
    return "\n".join(
        [
            "usage: m4 COMMAND [options]",
            "",
            "Masked multimodal models of human motion: data, training, evaluation, generation.",
            "",
            *lines,
            "",
            "m4 COMMAND --help   the options of a command",
            "m4 --version        the version",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``m4 arguments``, default those of this process; the exit status.

    The command finds its own arguments in ``sys.argv``, and its name as what was typed.
    """
    asked = list(sys.argv[1:] if arguments is None else arguments)
    if not asked or asked[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, *rest = asked
    if name in ("-V", "--version"):
        from m4kernels._version import __version__

        print(f"m4 {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: m4: expected {', '.join(COMMANDS)}, got {name!r}{hint} (see m4 --help)", file=sys.stderr)
        return 2
    sys.argv = [f"m4 {name}", *rest]
    try:
        command = importlib.import_module(COMMANDS[name][0])
        from m4.cli import run_command
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    run_command(command.main)


def entry() -> None:
    """What the installed script calls."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `m4 --help | head -1`, which has seen enough
        sys.stderr.close()
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    entry()
