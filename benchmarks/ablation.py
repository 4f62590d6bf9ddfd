"""`python -m benchmarks.ablation`: the same recipe under every combination of some settings, several seeds each.

Trains and evaluates one run after another, in processes of their own, in OUT/runs. What is evaluated already is not run
again, so the same command goes on after Ctrl-C. OUT/ablation.json has the figures of every run, and their mean and
spread over seeds; OUT/ablation.png shows the error of the next pose and its loss over training samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import machine
from m4.arguments import CommandParser, check_picture_path, whole
from m4.cli import python_command, run_command
from m4.config import TrainConfig, config_to_dict, load_config
from m4.errors import ConfigError
from m4.evaluation.next_moment import MOST_FUTURES
from m4.evaluation.report import report_path
from m4.files import write_atomically
from m4.pictures.curves import FIGURE_ENDINGS, figure_bytes, variant_curves
from m4.run.directory import SUMMARY_FILE, resolve_paths
from m4.run.metrics import METRICS_FILE, read_metrics

OURS = ("seed", "run_name", "output_dir")  # what the harness sets itself
POSE_LOSS = "coords_next"  # drawn beside the error of the next pose
# Name → where it is in an evaluation.
EVALUATED = {
    "error_px": ("next", "pose", "error_px"),
    "copy_px": ("next", "pose", "copy", "error_px"),
    "nearest_px": ("next", "pose", "nearest", "error_px"),
    "displacement_nearest_px": ("next", "pose", "displacement", "nearest", "error_px"),
    "pck_0.2": ("next", "pose", "pck", "0.2"),
    "nats": ("next", "pose", "nats"),
    "displacement_nats": ("next", "pose", "displacement", "nats"),
    "token_accuracy": ("next", "frame", "token_accuracy"),
    "psnr": ("next", "frame", "psnr"),
    "psnr_person": ("next", "frame", "psnr_person"),
}

Execute = Callable[[Sequence[str]], int]  # a command → its exit status


class Run(NamedTuple):
    """One training of the recipe."""

    variant: dict[str, str]  # key → value, as typed
    seed: int
    config: TrainConfig
    overrides: list[str]  # key=value

    @property
    def label(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.variant.items()) or "as configured"


class Failed(ConfigError):
    """A command of a run that did not end with 0. ``status``: what it ended with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def planned(
    path: Path, varied: Mapping[str, Sequence[str]], seeds: Sequence[int], settings: Sequence[str], out: Path
) -> list[Run]:
    """Every combination and seed, the seeds of a combination one after another; all checked.

    Raises:
        ConfigError: a setting cannot be run, or is one that the harness sets.
    """
    for key in [*varied, *(text.partition("=")[0] for text in settings)]:
        if key in OURS:
            raise ConfigError(f"{key}: set by the ablation itself; give seeds with --seeds and a folder with --out")
    twice = [key for key in varied if key in {text.partition("=")[0] for text in settings}]
    if twice:
        raise ConfigError(f"{twice[0]}: given to both --vary and --set")
    runs, names = [], set()
    for values in itertools.product(*varied.values()):
        variant = dict(zip(varied, values, strict=True))
        for seed in seeds:
            name = ",".join([*(f"{key}={value}" for key, value in variant.items()), f"seed={seed}"])
            name = re.sub(r"[^\w.,:=@+-]+", "-", name)
            if name in names:
                raise ConfigError(f"--vary: two combinations would be the run {name}; give values of different names")
            names.add(name)
            overrides = [*settings, *(f"{key}={value}" for key, value in variant.items())]
            overrides += [f"seed={seed}", f"output_dir={out / 'runs'}", f"run_name={name}"]
            runs.append(Run(variant, seed, resolve_paths(load_config(path, overrides)[0]), overrides))
    return runs


def is_done(run: Run, futures: int) -> bool:
    """Whether the run has been evaluated as wanted.

    Raises:
        ConfigError: its folder holds a run of another configuration.
    """
    folder = run.config.run_dir
    evaluation = report_path(folder, run.config.data.eval_split)
    if not evaluation.exists():
        return False
    saved, wanted = (_flat(config) for config in (load_config(folder / "config.yaml")[0], run.config))
    changed = [key for key in wanted if saved[key] != wanted[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"--out: {folder} is a run of another configuration ({key} is {saved[key]!r} there and {wanted[key]!r} "
            "now); give another folder, or remove that run"
        )
    pose = _inside(json.loads(evaluation.read_bytes()), ("next", "pose"))
    return not futures or pose is None or _inside(pose, ("nearest", "samples")) == futures


def perform(run: Run, config: Path, evaluate_options: Sequence[str], execute: Execute) -> None:
    """Train, or resume, and evaluate. Raises Failed."""
    folder = str(run.config.run_dir)
    commands = [
        ["m4.train", "--config", str(config), *run.overrides],
        ["m4.evaluate", "--run", folder, "--split", run.config.data.eval_split, *evaluate_options],
    ]
    for command in commands:
        status = execute([sys.executable, "-m", *command])
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise Failed(f"python -m {shlex.join(command)} ended with status {status}; what it said is above", status)


def execute(command: Sequence[str]) -> int:
    """Run a command to its end; its status, 128 + the signal's number if one killed it.

    Ctrl-C reaches it too, and SIGTERM is handed on: what it saves then is waited for.
    """
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return 128 - status if status < 0 else status


def _last_evaluation(run: Run) -> dict[str, Any]:
    """The last one during training; {} where there is none."""
    lines = _evaluations(run)
    return lines[-1] if lines else {}


def _evaluations(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.config.run_dir / METRICS_FILE) if line.get("kind") == "eval"]


def figures(run: Run) -> dict[str, float | None]:
    """What the evaluation and the summary of a run say, and of averaged weights its last evaluation during training;
    None for what they do not."""
    folder = run.config.run_dir
    evaluation = json.loads(report_path(folder, run.config.data.eval_split).read_bytes())
    summary = json.loads((folder / SUMMARY_FILE).read_bytes())
    found = {name: _inside(evaluation, place) for name, place in EVALUATED.items()}
    found |= {f"loss_{name}": loss for name, loss in evaluation["per_modality"].items()}
    last = _last_evaluation(run)
    for name, place in (("last_loss", ("loss",)), (f"last_loss_{POSE_LOSS}", ("per_modality", POSE_LOSS))):
        found |= {name: _inside(last, place), f"averaged_{name}": _inside(last, ("ema", *place))}
    return {**found, "samples_per_s": summary["samples_per_s"]}


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """mean, std (of a sample; None for fewer than two), min, max and number of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return {"mean": None, "std": None, "min": None, "max": None, "runs": 0}
    std = statistics.stdev(there) if len(there) > 1 else None
    return {"mean": statistics.fmean(there), "std": std, "min": min(there), "max": max(there), "runs": len(there)}


def by_variant(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Label → figure → its spread over the seeds."""
    labels = dict.fromkeys(record["label"] for record in records)
    groups = {label: [record["figures"] for record in records if record["label"] == label] for label in labels}
    return {label: {name: spread([run[name] for run in runs]) for name in runs[0]} for label, runs in groups.items()}


def table(variants: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a variant, mean ± standard deviation over its seeds; figures that no run has are left out."""
    names = [
        name for name in next(iter(variants.values())) if any(figures[name]["runs"] for figures in variants.values())
    ]
    lines = [f"| variant | seeds | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    for label, figures in variants.items():
        seeds = max(figures[name]["runs"] for name in names)
        lines.append(f"| {label} | {seeds} | {' | '.join(_cell(figures[name]) for name in names)} |")
    return "\n".join(lines)


def curve(run: Run, *, averaged: bool = False) -> list[dict[str, float | None]]:
    """The evaluations during training, as `variant_curves` takes them; of averaged weights there are losses only."""
    if averaged:
        return [
            {
                "samples": _samples(run, line),
                "error_px": None,
                "copy_px": None,
                "loss": _inside(line, ("ema", "per_modality", POSE_LOSS)),
            }
            for line in _evaluations(run)
        ]
    return [
        {
            "samples": _samples(run, line),
            "error_px": _inside(line, ("next", "pose", "error_px")),
            "copy_px": _inside(line, ("next", "pose", "copy", "error_px")),
            "loss": _inside(line, ("per_modality", POSE_LOSS)),
        }
        for line in _evaluations(run)
    ]


def _samples(run: Run, line: Mapping[str, Any]) -> int:
    return round(line["tokens"] * 1e6 / run.config.num_tokens_per_sample)


def ablate(
    path: Path,
    runs: Sequence[Run],
    out: Path,
    *,
    futures: int = 0,
    max_samples: int | None = None,
    command: str = "",
    execute: Execute = execute,
) -> dict[str, Any]:
    """Perform the runs that are not done, and keep the results of all in OUT, anew after every run."""
    options = ["--samples", str(futures)] if futures else []
    options += ["--max-samples", str(max_samples)] if max_samples else []
    here = machine()
    results: dict[str, Any] = {"command": command, "environment": here, "runs": [], "variants": {}}
    for run in runs:
        name, note = run.config.run_name, run.config.run_dir / "ablation.json"
        if not is_done(run, futures):
            print(f"ablation: {name}", file=sys.stderr, flush=True)
            perform(run, path, options, execute)
            made = {"time": _now(), **{key: here[key] for key in ("commit", "uncommitted_changes", "cpu", "threads")}}
            write_atomically(note, json.dumps(made).encode())
        results["runs"].append(
            {
                "run": name,
                "label": run.label,
                "variant": run.variant,
                "seed": run.seed,
                "made": json.loads(note.read_bytes()) if note.exists() else None,  # where and when
                "figures": figures(run),
            }
        )
        results["variants"] = by_variant(results["runs"])
        results["time"] = _now()
        write_atomically(out / "ablation.json", (json.dumps(results, indent=1) + "\n").encode())
    return results


def draw(runs: Sequence[Run], path: Path) -> bool:
    """Draw the curves of all runs; False where they say nothing of poses."""
    variants: dict[str, list] = {}
    for run in runs:
        variants.setdefault(run.label, []).append(curve(run))
        if run.config.ema:
            variants.setdefault(f"{run.label}, averaged weights", []).append(curve(run, averaged=True))
    figure = variant_curves(variants, POSE_LOSS)
    if figure is not None:
        write_atomically(path, figure_bytes(figure, path.suffix))
    return figure is not None


def main() -> int:
    arguments = _arguments()
    varied: dict[str, list[str]] = {}
    for key, values in arguments.vary:
        if key in varied:
            raise ConfigError(f"--vary: {key} is given twice; list its values in one: {key}=A,B")
        varied[key] = values
    picture = arguments.picture or arguments.out / "ablation.png"
    check_picture_path("--picture", picture, FIGURE_ENDINGS)
    runs = planned(arguments.config, varied, arguments.seeds, arguments.set, arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join([python_command(), "-m", "benchmarks.ablation", *sys.argv[1:]])
    try:
        results = ablate(
            arguments.config,
            runs,
            arguments.out,
            futures=arguments.samples,
            max_samples=arguments.max_samples,
            command=command,
        )
    except Failed as failed:
        if failed.status > 128:  # stopped by a signal
            print(failed, file=sys.stderr)
            return failed.status
        raise
    print(table(results["variants"]))
    drawn = f" and {picture}" if draw(runs, picture) else "; no picture, since no run has poses"
    print(f"wrote {arguments.out / 'ablation.json'}{drawn}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m benchmarks.ablation", description="Train and evaluate every combination of settings."
    )
    parser.add_argument("--config", type=Path, required=True, help="the recipe, for example M4-tiny.yaml")
    vary = "a key and its values, separated by commas; several make all combinations"
    parser.add_argument("--vary", type=_values, action="append", default=[], metavar="KEY=A,B", help=vary)
    parser.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1,2", help="default 0")
    settings = "what all runs have in common"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=settings)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the results")
    picture = "where to draw the curves (default: OUT/ablation.png)"
    parser.add_argument("--picture", type=Path, metavar="FILE", help=picture)
    futures = "next poses to draw for every sample, as of m4.evaluate (default 0: none)"
    parser.add_argument("--samples", type=whole(0, MOST_FUTURES), default=0, metavar="N", help=futures)
    parser.add_argument("--max-samples", type=whole(1), metavar="N", help="evaluate the first N only (default: all)")
    return parser.parse_args()


def _values(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    found = values.split(",")
    if not key or "" in found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected KEY=A,B with different values, got {text!r}")
    return key, found


def _seeds(text: str) -> list[int]:
    seeds = [whole(0)(part) for part in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"expected different seeds, got {text!r}")
    return seeds


def _flat(config: TrainConfig) -> dict[str, Any]:
    """Dotted key → value of what makes a run, wherever it lies."""
    flat: dict[str, Any] = {}
    for key, value in config_to_dict(resolve_paths(config)).items():
        if key not in ("run_name", "output_dir"):
            flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _inside(tree: Any, place: Sequence[str]) -> Any:
    for key in place:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _cell(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return "-"
    return f"{figure['mean']:.4g}" + ("" if figure["std"] is None else f" ± {figure['std']:.2g}")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    run_command(main)
