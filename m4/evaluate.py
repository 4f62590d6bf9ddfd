"""How well a model predicts a split: losses under fixed masks beside unigrams, the next moment beside copying."""

from __future__ import annotations

from m4.arguments import CommandParser, add_saved_run, whole
from m4.cli import run_command
from m4.evaluation.next_moment import MOST_FUTURES
from m4.evaluation.report import evaluate_run, report_table
from m4.saved_run import SavedRun


def main() -> int:
    parser = CommandParser(prog="python -m m4.evaluate", description=__doc__)
    add_saved_run(parser)
    parser.add_argument("--max-samples", type=whole(1), metavar="N", help="the first N of the split (default: all)")
    futures = "next poses to draw for every sample; the error of the nearest is said (default 0: none)"
    parser.add_argument("--samples", type=whole(0, MOST_FUTURES), default=0, metavar="N", help=futures)
    arguments = parser.parse_args()
    run = SavedRun.asked_for(arguments)
    print(report_table(evaluate_run(run, arguments.split, arguments.max_samples, arguments.samples)))
    return 0


if __name__ == "__main__":
    run_command(main)
