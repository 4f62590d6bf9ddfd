"""Predict the next frame and skeleton, and draw them: ``python -m m4.generate --run runs/NAME --out picture.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from m4.build import build_model, data_root, open_split
from m4.checkpoint import load_run, load_weights
from m4.cli import run_command
from m4.data.layout import require_meta
from m4.data.tokenizers import tokenizer_of
from m4.device import pick_device
from m4.errors import ConfigError
from m4.generation.decode import generate
from m4.generation.moments import check_moments, prediction_picture
from m4.modalities import NEXT, REFERENCE, RowLayout


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m m4.generate", description="Predict the next frame and skeleton of samples and draw them."
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory, for example runs/M4-tiny")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, for example prediction.png")
    parser.add_argument("--split", help="split to take samples from (default: the run's evaluation split)")
    parser.add_argument("--samples", type=int, default=4, help="samples, spread over the split (default 4)")
    parser.add_argument("--steps", type=int, default=12, help="decoding steps (default 12)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest; above: sampled")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--device", help="cpu, cuda or auto (default: as the run was configured)")
    parser.add_argument("--cosmos-dir", type=Path, help="folder of the Cosmos tokenizer, for data prepared with it")
    arguments = parser.parse_args()
    if not arguments.run.is_dir():
        raise ConfigError(f"--run: {arguments.run} is not a run directory")
    if arguments.samples < 1:
        raise ConfigError(f"--samples: expected at least 1, got {arguments.samples}")
    config, checkpoint = load_run(arguments.run)
    layout = RowLayout.of(config)
    check_moments(layout, arguments.run)
    device = pick_device(arguments.device or config.device)
    root = data_root(config)
    meta = require_meta(root)
    store = open_split(config, root, arguments.split or config.data.eval_split)
    model = build_model(config, device).eval()
    load_weights(checkpoint, model)
    rows = np.unique(np.linspace(0, len(store) - 1, arguments.samples).round().astype(int))
    true = store.batch(rows).to(device)
    predicted = generate(
        model,
        true,
        given=REFERENCE,
        wanted=NEXT,
        id_limits=layout.id_limits(meta).to(device),
        ordinal=layout.ordinal().to(device),
        steps=arguments.steps,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    picture = prediction_picture(true, predicted, meta, config, tokenizer_of(meta, cosmos_dir=arguments.cosmos_dir))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.out)
    print(f"wrote {arguments.out}: {len(rows)} samples of {checkpoint}")
    return 0


if __name__ == "__main__":
    run_command(main)
