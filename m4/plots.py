"""Loss curves of a run, from its metrics.jsonl: ``python -m m4.plots --run runs/NAME [--out curve.png]``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from m4.arguments import CommandParser, check_picture_path, run_directory
from m4.cli import run_command
from m4.config import load_config
from m4.errors import ConfigError
from m4.files import write_atomically
from m4.pictures.curves import FIGURE_ENDINGS, figure_bytes, loss_curves
from m4.run.metrics import METRICS_FILE, read_metrics


def main() -> int:
    parser = CommandParser(prog="python -m m4.plots", description="Draw the loss curves of a run.")
    parser.add_argument("--run", type=run_directory, required=True, help="run directory, for example runs/M4-tiny")
    parser.add_argument("--out", type=Path, help="picture to write (default: loss.png in the run directory)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "loss.png"
    check_picture_path("--out", out, FIGURE_ENDINGS)
    train, evaluations = read_losses(arguments.run / METRICS_FILE)
    figure = loss_curves(train, evaluations, read_unigram(arguments.run))
    write_atomically(out, figure_bytes(figure, out.suffix))
    print(f"wrote {out}")
    return 0


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
