"""Pictures of a run or a recipe: ``python -m m4.plots --run runs/NAME [--what masks] [--out picture.png]``.

losses: loss and pose error over training, from metrics.jsonl. masks: which tokens of the first samples are input,
target, unused. attention: which tokens may look at which. schedule: the learning rate, and when evaluations and saves
are due.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from m4.arguments import CommandParser, check_picture_path, run_directory, whole
from m4.batches.states import INPUT, TARGET, mask_states
from m4.cli import run_command
from m4.config import TrainConfig, load_config
from m4.errors import ConfigError
from m4.files import write_atomically
from m4.modalities import RowLayout
from m4.model.config import allow_matrix
from m4.pictures.curves import FIGURE_ENDINGS, figure_bytes, loss_curves
from m4.pictures.masks import attention_patterns, mask_layouts, schedule_curve
from m4.run.metrics import METRICS_FILE, read_metrics
from m4.schedule import LearningRate, Schedule

_SAMPLES, _MOST_SAMPLES = 6, 40
_ROW = 32  # tokens in a row of a modality that has no shape of its own
_POINTS = 500  # of a curve


def main() -> int:
    parser = CommandParser(
        prog="python -m m4.plots",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--run", type=run_directory, help="run directory, for example runs/M4-tiny")
    whose.add_argument("--config", type=Path, metavar="FILE", help="in place of a run, a recipe; not for losses")
    parser.add_argument("--what", choices=["losses", *_OF_A_RECIPE], default="losses", help="default losses")
    samples = f"whose masks are drawn (default {_SAMPLES})"
    parser.add_argument("--samples", type=whole(1, _MOST_SAMPLES), default=_SAMPLES, metavar="N", help=samples)
    out = "picture to write (default, of a run: loss.png, masks.png, … in its folder)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    asked = parser.parse_args()
    if asked.run is None and (asked.what == "losses" or asked.out is None):
        lacking = "--run: losses are of a run" if asked.what == "losses" else "--out: name the picture to write"
        raise ConfigError(f"{lacking} (see {parser.prog} --help)")
    name = "loss" if asked.what == "losses" else asked.what
    out = asked.out or asked.run / f"{name}.png"
    check_picture_path("--out", out, FIGURE_ENDINGS)
    if asked.what == "losses":
        figure = draw_losses(asked.run)
    else:
        figure = draw_recipe(asked.what, _config(asked), asked.samples)
    write_atomically(out, figure_bytes(figure, out.suffix))
    print(f"wrote {out}")
    return 0


def draw_losses(run: Path) -> Figure:
    """Loss and pose error of a run over its training, from its metrics.jsonl. Raises ConfigError as `read_losses`."""
    train, evaluations = read_losses(run / METRICS_FILE)
    return loss_curves(train, evaluations, read_unigram(run))


def draw_recipe(what: str, config: TrainConfig, samples: int = _SAMPLES) -> Figure:
    """What a recipe comes to, before any training.

    Args:
        what: masks of the first so many ``samples`` in training, attention of the first of them, or schedule.
    """
    return _OF_A_RECIPE[what](config, samples)


def _config(asked: argparse.Namespace) -> TrainConfig:
    path = asked.config or asked.run / "config.yaml"
    if asked.run is not None and not path.is_file():
        raise ConfigError(f"--run: {asked.run} holds no config.yaml; name a recipe with --config FILE")
    return load_config(path)[0]


def _masks(config: TrainConfig, samples: int) -> Figure:
    layout = RowLayout.of(config)
    states = mask_states(config, samples)
    return mask_layouts(
        [{name: _in_rows(row[layout.span(name)], layout[name].shape) for name in layout.modalities} for row in states]
    )


def _in_rows(states: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """States (T,) as rows and columns: of the modality's shape, or line by line, the last filled up as unused."""
    if len(shape) == 2:
        return states.reshape(shape)
    width = min(_ROW, len(states))
    rows = -(-len(states) // width)
    return np.pad(states, (0, rows * width - len(states))).reshape(rows, width)


def _attention(config: TrainConfig, _: int) -> Figure:
    """Of the first sample in training."""
    layout, model = RowLayout.of(config), config.model_config()
    (states,) = mask_states(config, 1)
    counts = {
        state: np.array([int((states[span] == state).sum()) for span in layout.spans]) for state in (INPUT, TARGET)
    }
    sides = {"encoder": (INPUT, INPUT), "decoder": (TARGET, TARGET), "cross": (TARGET, INPUT)}
    panels = {}
    for key, (queries, keys) in sides.items():
        pattern = getattr(model.attention, key)
        allow = allow_matrix(pattern, len(layout.modalities), f"attention.{key}")
        matrix = np.ones((len(counts[queries]),) * 2, bool) if allow is None else allow.numpy()
        title = pattern if isinstance(pattern, str) else "by modality"
        panels[f"{key} ({title})"] = counts[queries], counts[keys], matrix
    return attention_patterns(layout.modalities, panels)


def _schedule(config: TrainConfig, _: int) -> Figure:
    schedule, rate = Schedule.of(config, 1), LearningRate.of(config)
    tokens = np.linspace(0, config.total_tokens, _POINTS)
    due = {"evaluation": config.eval_freq, "checkpoint": config.save_ckpt_freq}
    marks = {what: _due(schedule, every) for what, every in due.items()}
    return schedule_curve(tokens.tolist(), [rate.at(float(t)) for t in tokens], marks)


def _due(schedule: Schedule, every: float) -> list[float]:
    """Counted tokens after which something is due, as many as a picture can show; the end of the run is among them."""
    found: list[float] = []
    step = 0
    while step < schedule.steps and len(found) < _POINTS:
        step = schedule.next_due(every, step)
        found.append(schedule.tokens(step * schedule.samples_per_step))
    return found


_OF_A_RECIPE: dict[str, Callable[[TrainConfig, int], Figure]] = {
    "masks": _masks,
    "attention": _attention,
    "schedule": _schedule,
}


def read_losses(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training and of evaluation in a metrics file.

    Raises:
        ConfigError: naming the file and the line that is damaged; or there is no line of training yet.
    """
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for number, line in enumerate(read_metrics(path), start=1):
        if line.get("kind") not in kinds:
            continue
        if not (
            _is_number(line.get("tokens"))
            and (_is_number(line.get("loss")) or ("loss" in line and line["loss"] is None))  # a skipped step has none
            and isinstance(line.get("per_modality"), dict)
            and all(value is None or _is_number(value) for value in line["per_modality"].values())
        ):
            raise ConfigError(
                f"{path}:{number}: expected the numbers tokens, loss and per_modality, got {json.dumps(line)[:200]}"
            )
        _check_next(line, f"{path}:{number}")
        kinds[line["kind"]].append(line)
    if not kinds["train"]:
        raise ConfigError(f"{path}: holds no training step yet; train the run first")
    return kinds["train"], kinds["eval"]


def _check_next(line: dict[str, Any], where: str) -> None:
    """Raise ConfigError unless what a line says of the next pose, if anything, can be drawn."""
    try:
        if "next" not in line or "pose" not in line["next"]:
            return
        pose = line["next"]["pose"]
        errors = [pose["error_px"], pose["copy"]["error_px"]]
    except (KeyError, TypeError):
        errors = [""]
    if not all(error is None or _is_number(error) for error in errors):
        raise ConfigError(
            f"{where}: expected next.pose with the numbers error_px and copy.error_px, got "
            f"{json.dumps(line['next'])[:200]}"
        )


def read_unigram(run_dir: Path) -> dict[str, float]:
    """Modality → the unigram cross-entropy that the evaluation of the run's evaluation split found; {} without one.

    Raises:
        ConfigError: naming the file that is damaged.
    """
    config = run_dir / "config.yaml"
    split = load_config(config)[0].data.eval_split if config.is_file() else "eval"
    path = run_dir / f"evaluation-{split}.json"
    if not path.exists():
        return {}
    try:
        unigram = json.loads(path.read_bytes())["unigram"]
        found = {name: figures["cross_entropy"] for name, figures in unigram.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected an evaluation with unigram figures, got a file in which {_fault(error)}; "
            f"write it again: python -m m4.evaluate --run {run_dir} --split {split}"
        ) from error
    return {name: value for name, value in found.items() if _is_number(value) and math.isfinite(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fault(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else f"something else stands ({error})"


if __name__ == "__main__":
    run_command(main)
