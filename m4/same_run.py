"""What makes a checkpoint one of this run: what may change between the two, and what may not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4.config import TrainConfig, config_to_dict
from m4.errors import CheckpointError

# What may change between a checkpoint and the run that resumes it. Everything else makes it another run: data, masks,
# model, samples of a step, seed, length and decay. docs/contracts.md says so too.
FREE_KEYS = {
    "run_name",
    "output_dir",
    "device",
    "compile",
    "cuda_graphs",
    "kernels",
    "activation_checkpointing",
    "profile",
    "parallel",
    "rank_timeout",
    "model.init",
    "stop_after_steps",
    "training_time",
    "keep_ckpts",
    "keep_best",
    "async_checkpoints",
    "resume",
    "init_from",
    "save_ckpt_freq",
    "eval_freq",
    "eval_samples",
    "eval_seed",
    "eval_generate_samples",
}
FREE_SECTIONS = {"data", "log"}  # the data's content is compared by its fingerprint
BOUND_KEYS = {"data.mirror", "data.order"}  # of these sections: what training sees
# What checkpoints that lack a key were trained with: it came later.
BEFORE_KEYS = {
    "data.mirror": False,
    "data.order": "sorted",
    "vocab_lr_scale": 1.0,
    "coords_lr_scale": None,
    "vocab_eps": 1e-8,
    "skip_non_finite": 0,
    "ema": 0.0,
    "optimizer": "adamw",
}
# May change too, which the log says: what helps a run that diverged. Weights, moments and the order of samples keep
# their meaning under another learning rate, clipping or precision; the rate is a function of the tokens so far.
ANNOUNCED_KEYS = {"lr", "min_lr", "token_warmup", "clip_grad", "skip_non_finite", "ema", "dtype"}
BATCH_KEYS = {"batch_size", "global_batch_size"}  # compared by their product, the samples a step


@dataclass(frozen=True)
class RunIdentity:
    """What a run is besides its configuration, and the number of ranks, which may change."""

    data_fingerprint: str
    samples_per_step: int
    ranks: int = 1


def check_same_run(path: Path, meta: dict[str, Any], config: TrainConfig, identity: RunIdentity) -> list[str]:
    """Raise `CheckpointError` naming the first setting in which the checkpoint is of another run.

    Returns:
        A line for each setting that changed and may.
    """
    saved, now = BEFORE_KEYS | _trajectory(meta["config"]), _trajectory(config_to_dict(config))
    names = {
        "samples_per_step": "samples a step (batch_size times accumulation)",
        "data_fingerprint": "data fingerprint",
    }
    for key, name in names.items():
        saved[name], now[name] = meta[key], getattr(identity, key)
    changes = [(key, saved[key], now[key]) for key in now if key in saved and saved[key] != now[key]]
    differences = [change for change in changes if change[0] not in ANNOUNCED_KEYS]
    if differences:
        key, before, after = differences[0]
        more = (
            f" (and {len(differences) - 1} more: {', '.join(d[0] for d in differences[1:])})" if differences[1:] else ""
        )
        remedy = "set it back"
        if key == names["samples_per_step"]:
            remedy = _same_samples(meta["samples_per_step"], config, identity.ranks)
        raise CheckpointError(
            f"{path}: checkpoint of another run: {key} is {before!r} there and {after!r} now{more}; "
            f"{remedy} to resume, or start a new run with run_name=NAME"
        )
    return [f"{key}: {before} in the checkpoint, {after} now" for key, before, after in changes]


def _same_samples(samples: int, config: TrainConfig, ranks: int) -> str:
    """What makes steps of so many samples again."""
    if samples % ranks:
        return f"{ranks} ranks cannot share {samples} samples: start a number of ranks that divides them"
    each = samples // ranks
    size = max(n for n in range(1, min(config.batch_size, each) + 1) if each % n == 0)
    return f"with {ranks} rank{'s' if ranks > 1 else ''} set batch_size={size} global_batch_size={samples}"


def _trajectory(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted key → value of what must not change on resuming."""
    flat = {}
    for key, value in config.items():
        inside = {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
        flat.update({k: v for k, v in inside.items() if key not in FREE_SECTIONS or k in BOUND_KEYS})
    return {key: value for key, value in flat.items() if key not in FREE_KEYS | BATCH_KEYS}
