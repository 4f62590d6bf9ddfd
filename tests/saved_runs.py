"""A data set that pictures can be made of, and a run on it that was saved without being trained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import yaml

from m4.build import build_model, open_split
from m4.checkpoint import RunIdentity, save_checkpoint
from m4.config import DataSection, LogSection, ModelSection, TrainConfig, config_to_yaml

LENGTHS = {"tok_rgb": 256, "coords": 39, "tok_rgb_next": 256, "coords_next": 39}
IDS = 512  # of codes and of bins


def write_data(root: Path, splits: dict[str, int]) -> Path:
    """Random tokens in the layout of prepared data, with the meta.json that pictures need."""
    random = np.random.default_rng(0)
    for split, samples in splits.items():
        for sample in range(samples):
            for name, length in LENGTHS.items():
                tokens = random.integers(0, IDS, length)
                if name.startswith("coords"):
                    tokens[26:] = 1
                folder = root / split / name / f"{sample:06d}"
                folder.mkdir(parents=True)
                np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    meta = {
        "format": "m4-tokens-v1",
        "options": {"tokenizer": "fsq", "framing": "center"},
        "modalities": {name: {"vocab_size": IDS} for name in LENGTHS},
    }
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def saved_config(root: Path, output_dir: Path) -> TrainConfig:
    """A small model on the data in ``root``, in the run folder output_dir/small."""
    return TrainConfig(
        vocab_sizes=[IDS] * 4,
        batch_size=4,
        global_batch_size=4,
        total_tokens=0.16,
        token_warmup=0.04,
        run_name="small",
        output_dir=str(output_dir),
        device="cpu",
        data=DataSection(root=str(root)),
        model=ModelSection(dim=16, head_dim=8, enc_depth=1, dec_depth=1),
        log=LogSection(tensorboard=False),
    )


def save_run(config: TrainConfig, steps: tuple[int, ...] = (3, 5)) -> Path:
    """The run folder with a checkpoint a step, each of other weights, and a line of metrics."""
    folder = config.run_dir
    train = open_split(config, Path(config.data.root), "train")
    for step in steps:
        model = build_model(dataclasses.replace(config, seed=step), torch.device("cpu"))
        with torch.no_grad():
            model.to_logits.weight.normal_(std=0.1)
        save_checkpoint(folder, step, model, {}, config, RunIdentity(train.fingerprint, config.batch_size))
    (folder / "config.yaml").write_text(config_to_yaml(config))
    (folder / "metrics.jsonl").write_text(metrics_line("train", 1) + metrics_line("eval", 1))
    return folder


def metrics_line(kind: str, step: int, loss: float = 6.0) -> str:
    line = {"kind": kind, "step": step, "tokens": step / 10, "loss": loss, "per_modality": dict.fromkeys(LENGTHS, loss)}
    return json.dumps(line) + "\n"


def edit_saved_config(folder: Path, output_dir: str | None = None, **data: object) -> None:
    """Change the data section that is saved with every checkpoint (as a run of an older version has it)."""
    for path in (folder / "checkpoints").glob("*/meta.json"):
        meta = json.loads(path.read_text())
        meta["config"]["output_dir"] = output_dir or meta["config"]["output_dir"]
        meta["config"]["data"] |= data
        path.write_text(json.dumps(meta))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], **data}}))
