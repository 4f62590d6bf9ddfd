"""Predict the next frame and skeleton, and draw them: ``python -m m4.generate --run runs/NAME --out picture.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m4.arguments import CommandParser, add_saved_run, check_picture_path, existing_folder, number, whole
from m4.cli import run_command
from m4.data.layout import require_meta
from m4.data.store import TokenStore
from m4.data.tokenizers import tokenizer_of
from m4.errors import ConfigError
from m4.files import write_atomically
from m4.generation.decode import MAX_SEED, MAX_TEMPERATURE, generate
from m4.generation.estimates import CodeValues
from m4.generation.moments import check_moments, prediction_picture
from m4.modalities import NEXT, REFERENCE, RowLayout
from m4.pictures.sheets import picture_bytes, picture_endings
from m4.run.console import show_progress
from m4.saved_run import SavedRun

_SAMPLES, _STEPS = 4, 12  # defaults
_MAX_SAMPLES = 60  # a picture of more rows is taller than some formats allow, and than anyone looks at
_SAMPLES_AT_ONCE = 4  # their logits over 64,000 ids are 0.3 GB


def main() -> int:
    arguments = _arguments()
    run = SavedRun.asked_for(arguments)
    layout = RowLayout.of(run.config)
    check_moments(layout, run.folder)
    _check_steps(arguments.steps, layout)
    split = run.split_name(arguments.split)
    meta = require_meta(run.root)
    tokenizer = tokenizer_of(meta, cosmos_dir=arguments.cosmos_dir)
    store = run.open_split(split)
    rows = _spread(store, arguments.samples, split)
    true = store.batch(rows).to(run.device)
    model = run.model()
    limits = layout.id_limits(meta).to(run.device)
    ordinal = layout.ordinal().to(run.device)
    values = CodeValues.of(layout, meta, run.device)

    def predicted(first: int) -> Tensor:
        return generate(
            model,
            true[first : first + _SAMPLES_AT_ONCE],
            given=REFERENCE,
            wanted=NEXT,
            id_limits=limits,
            ordinal=ordinal,
            code_values=values,
            steps=arguments.steps or _STEPS,
            temperature=arguments.temperature,
            seed=arguments.seed,
            first_sample=first,
        )

    firsts = range(0, len(rows), _SAMPLES_AT_ONCE)
    parts = [predicted(first) for first in show_progress(firsts, "decoding", len(firsts), unit="batches")]
    picture = prediction_picture(true, torch.cat(parts), meta, run.config, tokenizer)
    write_atomically(arguments.out, picture_bytes(picture, arguments.out.suffix))
    print(f"wrote {arguments.out}: {len(rows)} samples of {run.checkpoint}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m m4.generate", description="Predict the next frame and skeleton of samples and draw them."
    )
    add_saved_run(parser)
    parser.add_argument("--out", type=Path, required=True, help="picture to write, for example prediction.png")
    help_text = f"samples, spread over the split (default {_SAMPLES}, at most {_MAX_SAMPLES})"
    parser.add_argument("--samples", type=whole(1, _MAX_SAMPLES), help=help_text)
    parser.add_argument("--steps", type=whole(1), help=f"decoding steps (default {_STEPS})")
    temperature = "0 (default): the likeliest; above: sampled"
    parser.add_argument("--temperature", type=number(0, MAX_TEMPERATURE), default=0.0, help=temperature)
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="of the sampling (default 0)")
    cosmos = "folder of the Cosmos tokenizer, for data prepared with it"
    parser.add_argument("--cosmos-dir", type=existing_folder, help=cosmos)
    arguments = parser.parse_args()
    check_picture_path("--out", arguments.out, picture_endings())
    return arguments


def _check_steps(steps: int | None, layout: RowLayout) -> None:
    tokens = sum(layout[name].length for name in NEXT)
    if steps is not None and steps > tokens:
        raise ConfigError(f"--steps: expected 1 … {tokens}, one for each token of {' and '.join(NEXT)}, got {steps}")


def _spread(store: TokenStore, samples: int | None, split: str) -> np.ndarray:
    """Rows of a split, evenly spaced."""
    if samples is not None and samples > len(store):
        raise ConfigError(f"--samples: expected 1 … {len(store)}, as many as the split {split} holds, got {samples}")
    return np.unique(np.linspace(0, len(store) - 1, samples or _SAMPLES).round().astype(int))


if __name__ == "__main__":
    run_command(main)
