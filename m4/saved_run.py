"""A run that was trained before, opened to evaluate or to generate: its checkpoint, its data, its device.

Opening changes nothing on disk but the packed tokens beside the data. A run folder may have been moved, and a command
may be called from anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m4.build import build_model, open_split
from m4.checkpoint import EMA_FILE, best_checkpoint, checkpoint_meta, load_weights, newest_whole
from m4.config import TrainConfig, config_from_dict
from m4.data.layout import find_splits
from m4.data.sample_set import sample_command
from m4.data.store import TokenStore
from m4.device import pick_device
from m4.errors import CheckpointError, ConfigError
from m4.model import M4
from m4.run.directory import moved_along

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedRun:
    """A run directory, one of its checkpoints, and where it is to be looked at."""

    folder: Path
    checkpoint: Path
    config: TrainConfig  # as saved with the checkpoint
    device: torch.device
    root: Path  # of the data
    data_fingerprint: str  # of the split it was trained on
    cache_dir: Path | None
    averaged: bool = False  # the weights

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        checkpoint: Path | None = None,
        data: Path | None = None,
        device: str | None = None,
        ema: bool = False,
    ) -> SavedRun:
        """Open a run.

        Args:
            checkpoint: folder of a checkpoint, or its name in this run, or best, of lowest evaluation
                loss; default the newest.
            data: data root; default the run's own, found from the run's folder or the current one.
            device: default as the run was configured.
            ema: take the averaged weights.
        Raises:
            ConfigError, CheckpointError: the checkpoint, the device or the data is not there or cannot be used.
        """
        path, meta = _find_checkpoint(folder, checkpoint)
        config = _saved_config(path, meta)
        if ema and EMA_FILE not in meta["files"]:
            raise CheckpointError(
                f"--ema: {path} holds no averaged weights: it was trained with ema={config.ema:g}; "
                "train with ema=0.999, or leave --ema out"
            )
        device_key = "device" if device is None else "--device"
        return cls(
            folder=folder,
            checkpoint=path,
            config=config,
            device=pick_device(config.device if device is None else device, device_key),
            root=_find_data(folder, config) if data is None else data,
            data_fingerprint=str(meta.get("data_fingerprint")),
            cache_dir=None if config.data.cache_dir is None else _find(folder, config, config.data.cache_dir),
            averaged=ema,
        )

    @classmethod
    def asked_for(cls, arguments: argparse.Namespace) -> SavedRun:
        """Open the run that the arguments of `m4.arguments.add_saved_run` name."""
        return cls.open(
            arguments.run,
            checkpoint=arguments.checkpoint,
            data=arguments.data,
            device=arguments.device,
            ema=arguments.ema,
        )

    @property
    def checkpoint_name(self) -> str:
        """Of a checkpoint of this run its name, of another where it lies."""
        path = self.checkpoint.resolve()
        return path.name if path.parent == (self.folder / "checkpoints").resolve() else str(path)

    def split_name(self, split: str | None) -> str:
        """``split``, or the run's evaluation split. Raises ConfigError if the data has none of that name."""
        name = self.config.data.eval_split if split is None else split
        present = find_splits(self.root)
        if name not in present:
            raise ConfigError(f"--split: expected {' or '.join(present)}, the splits of {self.root}, got {name!r}")
        return name

    def open_split(self, split: str) -> TokenStore:
        """The packed tokens of one split."""
        cache_dir = None if self.cache_dir is None else str(self.cache_dir)
        section = dataclasses.replace(self.config.data, root=str(self.root), cache_dir=cache_dir)
        return open_split(dataclasses.replace(self.config, data=section), self.root, split)

    def model(self) -> M4:
        """The model with the weights of the checkpoint, or the averaged ones, ready to predict."""
        model = build_model(self.config, self.device).eval()
        load_weights(self.checkpoint, model, averaged=self.averaged)
        return model


def _find_checkpoint(folder: Path, checkpoint: Path | None) -> tuple[Path, dict[str, Any]]:
    if checkpoint is None:
        found = newest_whole(folder)
        if found is None:
            raise CheckpointError(
                f"--run: {folder} holds no whole checkpoint (checkpoints/step-…); train it until one is saved"
            )
        return found
    if str(checkpoint) == "best":
        found = best_checkpoint(folder)
        if found is None:
            raise CheckpointError(f"--checkpoint: best, but no checkpoint of {folder} was evaluated when it was saved")
        return found
    for path in (checkpoint, folder / "checkpoints" / checkpoint):
        if path.is_dir():
            try:
                return path, checkpoint_meta(path)
            except CheckpointError as error:
                raise CheckpointError(f"--checkpoint: {error}") from None
    present = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    raise CheckpointError(
        f"--checkpoint: expected a checkpoint folder, got {str(checkpoint)!r}, which is not there; "
        f"{folder} holds {', '.join(present) or 'none'}"
    )


def _saved_config(path: Path, meta: dict[str, Any]) -> TrainConfig:
    try:
        return config_from_dict(meta["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path / 'meta.json'}: the configuration saved there cannot be used: {what}") from error


def _find_data(folder: Path, config: TrainConfig) -> Path:
    """The data that a run was trained on, where it is still there."""
    sample = config.data.root is None
    saved = config.data.sample_dir if config.data.root is None else config.data.root
    root = _find(folder, config, saved)
    if root is not None:
        if sample:
            log.info("data: the embedded sample set in %s (small, synthetic), on which this run was trained", root)
        return root
    places = " or ".join(str(place) for place in _places(folder, config, saved))
    if sample:
        where = _places(folder, config, saved)[0]
        raise ConfigError(
            f"data.sample_dir: the embedded sample set, on which {folder} was trained, is not in {places}; "
            f"name it with --data ROOT, or make it: {sample_command(where, config.data.sample_videos)}"
        )
    raise ConfigError(f"data.root: the data of {folder} is not in {places}; name it with --data ROOT")


def _find(folder: Path, config: TrainConfig, saved: str) -> Path | None:
    return next((place for place in _places(folder, config, saved) if place.is_dir()), None)


def _places(folder: Path, config: TrainConfig, saved: str) -> list[Path]:
    """Where a saved path may be: as it stands if it is absolute, or moved along with the run; else from where the run
    was started, or from here.

    Where it was started can be told if its folder is still in the ``output_dir`` that was given there.
    """
    if Path(saved).is_absolute():
        moved = moved_along(folder, config, saved)
        return [Path(saved)] if moved is None else [Path(saved), moved]
    starts = [Path.cwd()]
    output, parent = Path(config.output_dir), folder.resolve().parent
    depth = len(output.parts)  # "." has none
    if not output.is_absolute() and parent.parts[len(parent.parts) - depth :] == output.parts:
        starts.insert(0, parent.parents[depth - 1] if depth else parent)
    return list(dict.fromkeys(start / saved for start in starts))
