"""`python -m benchmarks.plot`: draw a saved session to a PNG, one bar a provider, each case against its reference."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results import RESULTS, machine_name, readable

# Ours, the one that others are compared with first.
OURS = ("captured", "cpp", "cuda", "triton", "captured, compiled", "auto", "compiled")
COLOUR = "#1b6ca8"
OTHER = "#b8bec6"


def sessions(folder: Path) -> list[Path]:
    """The saved sessions in a machine's folder, oldest first."""
    return sorted(path for path in folder.glob("*.json") if path.name[0].isdigit())  # by their time


def newest(folder: Path) -> Path:
    """The session saved last in a machine's folder.

    Raises:
        SystemExit: there is none.
    """
    found = sessions(folder)
    if not found:
        raise SystemExit(f"no results in {folder}: run `pytest benchmarks/ --save-results` first")
    return found[-1]


def draw(session: dict[str, Any], out: Path) -> None:
    """One panel an op; a bar's length is its time over our kernel's, so longer is slower."""
    ops: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in session["records"]:
        ops.setdefault(record["op"], {}).setdefault(record["case"], []).append(record)
    rows = [sum(len(records) + 1 for records in cases.values()) for cases in ops.values()]
    figure, panels = plt.subplots(
        len(ops), 1, figsize=(9, 0.8 + 0.24 * sum(rows) + 0.5 * len(ops)), squeeze=False, height_ratios=rows
    )
    for axis, (op, cases) in zip(panels[:, 0], ops.items(), strict=True):
        y, ticks, labels = 0.0, [], []
        shortest = longest = 1.0
        for case, records in cases.items():
            ours = min(records, key=lambda r: OURS.index(r["provider"]) if r["provider"] in OURS else len(OURS))
            axis.text(1, y, f"{case}:  time relative to {ours['provider']}", va="center", fontsize=8, weight="bold")
            for record in records:
                y += 1
                ratio = record["seconds"] / ours["seconds"]
                shortest, longest = min(shortest, ratio), max(longest, ratio)
                shown = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
                axis.barh(y, ratio, color=COLOUR if record["provider"] in OURS else OTHER, height=0.75)
                axis.text(
                    ratio * 1.03,
                    y,
                    f"{shown}x  ({readable(record['seconds'])}, {record['rate']})",
                    va="center",
                    fontsize=7,
                )
                ticks.append(y)
                labels.append(record["provider"])
            y += 1
        axis.set_yticks(ticks, labels, fontsize=7)
        axis.set_ylim(y - 0.2, -0.8)
        axis.set_xscale("log")
        axis.set_xlim(0.9 * shortest, longest * 12)
        axis.set_title(op, fontsize=10, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    where = session["environment"]
    figure.suptitle(
        f"{where.get('gpu') or where['cpu']}, {where['threads']} threads, {where['simd']}; "
        f"torch {where['torch']}; commit {where['commit'][:7]}; {session['time'][:10]}",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="a saved session; default the newest of this machine")
    parser.add_argument("--out", type=Path, default=RESULTS / "benchmarks.png")
    parser.add_argument("--folder", type=Path, help="draw every session of this machine in there to a PNG beside it")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        newest(arguments.folder / machine_name())
        pairs = [(path, path.with_suffix(".png")) for path in sessions(arguments.folder / machine_name())]
    else:
        pairs = [(arguments.results or newest(RESULTS / machine_name()), arguments.out)]
    for path, out in pairs:
        if arguments.folder is None or not out.exists():
            draw(json.loads(path.read_text()), out)
            print(f"drew {path} to {out}")


if __name__ == "__main__":
    main()
