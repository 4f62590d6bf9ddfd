"""The run directory: where it is, one process at a time, room on the disk, and the summary it ends with."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from m4.config import RESUME_WORDS, TrainConfig, format_duration
from m4.device import peak_memory
from m4.distributed import World
from m4.errors import ConfigError
from m4.files import writable_folder, write_atomically
from m4.run.console import duration_text
from m4.run.state import LoopState
from m4.schedule import Schedule

log = logging.getLogger(__name__)

SUMMARY_FILE, LOCK_FILE = "summary.json", ".lock"
_SEEN_SECONDS = 20.0  # until what one machine writes is seen on another


def resolve_paths(config: TrainConfig) -> TrainConfig:
    """The same run with absolute paths, as it is saved: it can then be used from any folder. ~ is the home folder."""
    data = replace(
        config.data,
        root=config.data.root and _absolute(config.data.root),
        sample_dir=_absolute(config.data.sample_dir),
        cache_dir=config.data.cache_dir and _absolute(config.data.cache_dir),
    )
    return replace(
        config,
        data=data,
        output_dir=_absolute(config.output_dir),
        resume=config.resume if config.resume in RESUME_WORDS else _absolute(config.resume),
        init_from=config.init_from and _absolute(config.init_from),
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def moved_along(folder: Path, config: TrainConfig, saved: str) -> Path | None:
    """Where a saved path would be, had it moved together with the run: seen from ``folder``, where the run is now, it
    lies as it lay seen from where the run was saved. None for paths that shared nothing but the root."""
    before, now = config.run_dir, folder.resolve()
    if not (before.is_absolute() and os.path.isabs(saved)) or os.path.commonpath([before, saved]) == os.sep:
        return None
    place = Path(os.path.normpath(now / os.path.relpath(saved, before)))
    return None if place == Path(saved) else place


def check_not_moved(config_file: Path, config: TrainConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError for the configuration of a run whose folder has moved since it was saved: it would train, from
    the beginning, where the folder was. Naming ``run_name`` or ``output_dir`` says where to train."""
    folder = config_file.resolve().parent
    chosen = any(override.startswith(("run_name=", "output_dir=")) for override in overrides)
    is_run = config_file.name == "config.yaml" and (folder / "checkpoints").is_dir()
    if is_run and not chosen and config.run_dir.resolve() != folder:
        here = [f"output_dir={folder.parent}", f"run_name={folder.name}"]
        for key in ("root", "sample_dir", "cache_dir"):
            saved = getattr(config.data, key)
            place = None if saved is None or os.path.exists(saved) else moved_along(folder, config, saved)
            here += [f"data.{key}={place}"] if place is not None and place.is_dir() else []
        raise ConfigError(
            f"{config_file}: expected in {config.run_dir}, where this run was saved, found in {folder}; to resume it "
            f"here add {shlex.join(here)}, for a new run add run_name=NAME"
        )


@contextmanager
def only_process(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; two trainers in one would overwrite each other's checkpoints."""
    writable_folder(run_dir)
    writable_folder(run_dir / "checkpoints")
    path = run_dir / LOCK_FILE
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{run_dir}: another process is training there; wait, or set run_name=NAME") from None
        except OSError as error:
            raise ConfigError(
                f"{path}: this file system cannot lock files ({error.strerror}), which keeps two processes from "
                "training in one folder; set output_dir to a folder on another"
            ) from error
        yield


@contextmanager
def only_run(run_dir: Path, world: World) -> Iterator[None]:
    """`only_process` for all ranks of a run: the first one holds the directory, the others must see it."""
    with only_process(run_dir) if world.leads else nullcontext():
        world.largest(0)
        end = time.monotonic() + _SEEN_SECONDS
        while not (run_dir / LOCK_FILE).exists():
            if time.monotonic() > end:
                raise ConfigError(
                    f"output_dir: rank {world.rank} does not see {run_dir}, which rank 0 has made; set a folder on "
                    "a file system that all machines share"
                )
            time.sleep(0.1)
        yield


def check_room(run_dir: Path, checkpoint_bytes: int) -> None:
    """Raise ConfigError where not even the first checkpoint has room."""
    usage = shutil.disk_usage(run_dir)
    if 0 <= usage.free < checkpoint_bytes and usage.total:  # some file systems do not tell
        raise ConfigError(
            f"{run_dir}: {usage.free / 1e9:.2f} GB are free there and a checkpoint takes "
            f"{checkpoint_bytes / 1e9:.2f} GB; make room, or set output_dir to a folder on another disk"
        )


def summarised_step(run_dir: Path) -> int | None:
    """The step that the summary of a run is of; None where there is none, or a damaged one."""
    try:
        return json.loads((run_dir / SUMMARY_FILE).read_bytes())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_summary(config: TrainConfig, schedule: Schedule, state: LoopState, device: torch.device) -> None:
    """Write summary.json and log how the wall clock compares with the reference."""
    speed = state.position / state.seconds if state.seconds else None
    projected = config.total_samples / speed if speed else None
    reference = config.training_seconds
    summary = {
        "run_name": config.run_name,
        "finished": state.step >= schedule.steps,
        "steps": state.step,
        "samples": state.position,
        "counted_tokens": state.position * schedule.tokens_per_sample,
        "first_evaluation": state.first_evaluation,
        "evaluation": state.evaluation,
        "evaluation_step": state.evaluated_step,
        "samples_per_s": speed,
        "counted_tokens_per_s": speed and speed * schedule.tokens_per_sample,
        "wall_clock_seconds": state.seconds,
        "whole_recipe_seconds": projected,  # total_tokens at this speed
        "training_time_seconds": reference,
        "speedup_over_training_time": reference / projected if reference and projected else None,
        "peak_memory_bytes": peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_atomically(config.run_dir / SUMMARY_FILE, (json.dumps(summary, indent=1) + "\n").encode())
    if projected and reference:
        log.info(
            "trained for %s; at this speed the whole recipe of this configuration takes %s, the reference took %s",
            duration_text(state.seconds),
            duration_text(projected),
            format_duration(reference),
        )
