"""``--dry-run``: what a run comes to and where each number is from, its first batch checked, nothing written."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from m4.batches.packing import drawn_counts
from m4.build import masking_spec
from m4.checkpoint import SavedCheckpoint, check_same_run, checkpoint_bytes
from m4.config import TrainConfig, config_to_yaml
from m4.data.store import is_at_hand
from m4.device import TRAINING_DTYPES, total_memory
from m4.model.weights import load_matching
from m4.run.console import duration_text
from m4.run.directory import resolve_paths
from m4.schedule import Schedule, learning_rate
from m4.training.preflight import SmokeReport
from m4.training.start import load_initial_weights, starting_points
from m4.training.trainer import Trainer

log = logging.getLogger(__name__)

_FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a device while a run trains; activations by `_activation_widths`, logits are never held."""

    weights: int
    gradients: int
    moments: int
    averages: int
    activations: int
    copy: int = 0  # of what is saved, where the device is the host

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.averages + self.activations + self.copy


def dry_run(config: TrainConfig) -> str:
    """Work out a run and check its first batch; returns what to print. Nothing is written but to temporary folders.

    Raises:
        ValueError: whatever would stop the run before its first step.
    """
    config = resolve_paths(config)
    with _borrowed_data(config) as readable:
        trainer = Trainer(readable)
        start = next(starting_points(config), None)
        if start is None:
            load_initial_weights(trainer.model, config)
        else:
            check_same_run(start.path, start.meta, config, trainer.identity)
            load_matching(start.weights, trainer.model, str(start.path))
        position = 0 if start is None else start.state["loop"]["position"]
        smoke = trainer.probe.smoke_test(position)
        sections = [
            ("configuration, resolved", config_to_yaml(config).rstrip().splitlines()),
            ("what it comes to", _numbers(config, trainer, start)),
            ("schedule, by total_tokens, token_warmup, lr, min_lr", _schedule(config, trainer.schedule)),
            ("memory on the device, about", _memory(config, trainer)),
            ("disk", _disk(config, trainer)),
            ("one-batch check", _check(config, trainer.schedule, smoke)),
        ]
    lines = [line for title, inside in sections for line in (f"{title}:", *(f"  {one}" for one in inside), "")]
    return "\n".join([*lines, "dry run: nothing was written; leave --dry-run out to train"])


@contextmanager
def _borrowed_data(config: TrainConfig) -> Iterator[TrainConfig]:
    """The configuration with packed tokens, and the sample set, in a temporary folder where they are not there yet."""
    data = config.data
    with tempfile.TemporaryDirectory(prefix="m4-dry-run-") as folder:
        if data.root is None and not os.path.isdir(data.sample_dir):
            log.info("the sample set is not in %s yet: making it in a temporary folder", data.sample_dir)
            data = replace(data, sample_dir=os.path.join(folder, "sample"))
        else:
            root = Path(data.root or data.sample_dir)
            cache = None if data.cache_dir is None else Path(data.cache_dir)
            splits = (data.train_split, data.eval_split)
            if root.is_dir() and not all(
                is_at_hand(root, split, config.modalities, config.max_seq_lens, cache) for split in splits
            ):
                log.info("what is kept beside the tokens in %s goes to a temporary folder", root)
                data = replace(data, cache_dir=os.path.join(folder, "cache"))
        yield replace(config, data=data)


def _numbers(config: TrainConfig, trainer: Trainer, start: SavedCheckpoint | None) -> list[str]:
    schedule, model = trainer.schedule, trainer.model
    vocabulary = model.enc_tok_emb.weight.numel() + model.to_logits.weight.numel()
    begins = (
        f"{start.path}, step {start.meta['step']:,}" if start else config.init_from or "initial values by model.init"
    )
    return [
        f"run directory  {config.run_dir}  (output_dir / run_name)",
        f"starts from    {begins}  (resume: {config.resume}, init_from)",
        f"device         {trainer.device}, {config.dtype}  (device: {config.device}, dtype)",
        f"parameters     {model.num_parameters():,}, of which {vocabulary:,} for the vocabulary  (model, vocab_sizes)",
        f"data           {len(trainer.stores.train):,} training and {len(trainer.stores.evaluation):,} evaluation "
        f"samples  (data.root: {config.data.root or 'the sample set'})",
        f"accumulation   {schedule.accumulation}  (global_batch_size {config.global_batch_size} over batch_size "
        f"{config.batch_size} x {trainer.world.size} processes, rounded, at least 1)",
        f"samples a step {schedule.samples_per_step:,}  (accumulation x batch_size x processes)",
        f"samples        {config.total_samples:,}  (total_tokens {config.total_tokens:g} M over num_tokens_per_sample "
        f"{config.num_tokens_per_sample})",
        f"steps          {schedule.steps:,}  (samples over samples a step, rounded up)",
        f"epochs         {schedule.samples / len(trainer.stores.train):,.2f}  (samples of all steps over the split's)",
    ]


def _schedule(config: TrainConfig, schedule: Schedule) -> list[str]:
    steps, at = schedule.steps, {1, schedule.steps}
    at |= {max(1, round(steps * share)) for share in (0.25, 0.5, 0.75)}
    at.add(min(steps, max(1, round(config.token_warmup / schedule.tokens(schedule.samples_per_step)))))
    lines = [
        f"step {step:>9,}  {schedule.tokens(step * schedule.samples_per_step):>12,.4g} M tokens  lr "
        f"{learning_rate(schedule.tokens(step * schedule.samples_per_step), config):.4g}"
        for step in sorted(at)
    ]
    for what, key in (("evaluated", "eval_freq"), ("saved", "save_ckpt_freq")):
        every = getattr(config, key) / schedule.tokens(schedule.samples_per_step)
        lines.append(f"{what} every {every:,.4g} steps ({key} {getattr(config, key):g} M tokens), and at the end")
    if config.stop_after_steps is not None:
        lines.append(f"stops after step {config.stop_after_steps:,} (stop_after_steps)")
    return lines


def estimate_memory(config: TrainConfig, trainer: Trainer) -> MemoryEstimate:
    """What training takes on the device: a sum of what is known to be held, by the masks' mean number of tokens."""
    matrices = {p for group in trainer.optimizer.param_groups if group.get("lr_on_host") for p in group["params"]}
    parameters = list(trainer.model.parameters())
    count = sum(p.numel() for p in parameters)
    with_one = sum(p.numel() for p in matrices)
    spec = masking_spec(config)
    inputs, targets = (c.sum(1).mean() for c in drawn_counts(spec, seed=0, sample_ids=np.arange(256)))
    encoder, decoder = _activation_widths(config)
    width = config.model.dim * TRAINING_DTYPES[config.dtype].itemsize
    activations = config.batch_size * width * float(inputs * encoder + targets * decoder)
    return MemoryEstimate(
        weights=count * _FLOAT32,
        gradients=count * _FLOAT32,
        moments=(2 * count - with_one) * _FLOAT32,
        averages=count * _FLOAT32 if config.ema else 0,
        activations=round(activations),
        copy=_copy(config, trainer) if trainer.device.type == "cpu" else 0,
    )


def _activation_widths(config: TrainConfig) -> tuple[float, float]:
    """What the backward pass needs of a visible token and of a target, in vectors of length dim, over all blocks.

    A block keeps the input and output of its norms, queries, keys and values, the output of attention, and the hidden
    layer of its MLP before and after the GELU; a decoder's also those of cross-attention, whose context (its norm, keys
    and values) is of visible tokens.
    """
    model = config.model
    self_attention, mlp, queries, context = 2 + 3 + 1, 2 + 2 * model.mlp_ratio, 2 + 1 + 1, 1 + 2
    encoder_block, decoder_block = self_attention + mlp, self_attention + queries + mlp
    if config.activation_checkpointing:  # the input of each block, and all of one
        return (
            model.enc_depth + max(encoder_block, context),
            model.dec_depth + decoder_block,
        )
    return (
        model.enc_depth * encoder_block + model.dec_depth * context,
        model.dec_depth * decoder_block,
    )


def _copy(config: TrainConfig, trainer: Trainer) -> int:
    """Bytes of the host that a checkpoint is written from while training goes on."""
    return checkpoint_bytes(trainer.model, averaged=bool(config.ema)) if config.async_checkpoints else 0


def _memory(config: TrainConfig, trainer: Trainer) -> list[str]:
    memory, there = estimate_memory(config, trainer), total_memory(trainer.device)
    moments = "one for matrices of the trunk, two for others" if config.optimizer == "muon" else "two"
    rows = [
        ("weights", memory.weights, "parameters x 4 bytes"),
        ("gradients", memory.gradients, "the same"),
        ("moments", memory.moments, f"optimizer {config.optimizer}: {moments}"),
        ("averages", memory.averages, f"ema {config.ema:g}"),
        ("activations", memory.activations, f"batch_size {config.batch_size}, mean tokens of the masks, "
         f"{config.dtype}, activation_checkpointing {str(config.activation_checkpointing).lower()}"),
        ("copy to save", memory.copy, "async_checkpoints: weights, moments and averages, from the first save on"),
        ("together", memory.total, f"of {_size(there)} on {trainer.device}; libraries, logits in pieces and batches on "
         "top"),
    ]  # fmt: skip
    if trainer.device.type != "cpu" and config.async_checkpoints:
        on_host = (
            "on the host",
            _copy(config, trainer),
            "async_checkpoints: copies in pinned memory, at most twice that",
        )
        rows = [*(row for row in rows if row[0] != "copy to save"), on_host]
    return [f"{name:<12} {_size(amount):>10}  ({source})" for name, amount, source in rows]


def _disk(config: TrainConfig, trainer: Trainer) -> list[str]:
    one = checkpoint_bytes(trainer.model, averaged=bool(config.ema))
    kept = config.keep_ckpts + config.keep_best
    return [
        f"a checkpoint   {_size(one):>10}  (weights, moments{', averages' if config.ema else ''})",
        f"at most        {_size(one * (kept + 1)):>10}  (keep_ckpts {config.keep_ckpts} + keep_best {config.keep_best} "
        "+ the one being written)",
    ]


def _check(config: TrainConfig, schedule: Schedule, smoke: SmokeReport) -> list[str]:
    def seconds(samples: int) -> str:
        return duration_text(smoke.recipe_seconds(samples, config.batch_size))

    return [
        "passed: ids within vocab_sizes, targets in every sample, losses and gradients finite",
        f"forward and backward take {smoke.per_sample:.3g} s a sample here, so about "
        f"{seconds(schedule.samples_per_step)} a step and {seconds(schedule.samples)} for all {schedule.steps:,} steps",
    ]


def _size(amount: float) -> str:
    return f"{amount / 1e9:,.2f} GB" if amount >= 1e8 else f"{amount / 1e6:,.2f} MB"
