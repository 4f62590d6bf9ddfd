"""Where a run starts: from a checkpoint of its own, from one that is named, from given weights, or from nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from m4.checkpoint import META_FILE, SavedCheckpoint, load_nano4m, read_checkpoint, read_checkpoints, step_folders
from m4.config import TrainConfig
from m4.distributed import World
from m4.errors import CheckpointError, ConfigError
from m4.model import M4
from m4.model.weights import load_matching

log = logging.getLogger(__name__)


def starting_points(config: TrainConfig) -> Iterator[SavedCheckpoint]:
    """The checkpoints that a run may go on from, the best first; none for one that starts afresh.

    ``resume: auto`` is the run's own, the newest first. ``never`` is none, and refuses a folder that has some. A path
    (of a checkpoint, or of a run: its newest) is where a run without checkpoints of its own begins; once it has some
    they go first, so that the same command resumes it.

    Raises:
        ConfigError: naming ``resume``; also when the next is asked for after a checkpoint that was named.
        CheckpointError: the checkpoint that was named is damaged.
    """
    run_dir, own = config.run_dir, step_folders(config.run_dir)
    if config.resume == "never":
        if own:
            raise ConfigError(
                f"resume: never, but {run_dir} holds checkpoints, the newest {own[-1].name}; set run_name=NAME for a "
                "new run, or resume=auto to go on with this one"
            )
        return
    if config.resume == "auto":
        yield from read_checkpoints(run_dir)
        return
    named = Path(config.resume)
    if named.resolve().parent == (run_dir / "checkpoints").resolve():
        if own and own[-1].name > named.name:
            raise ConfigError(
                f"resume: {named} is not the newest checkpoint of this run, which is {own[-1].name}; add run_name=NAME "
                "to go on from there in a folder of its own, or resume=auto to go on from the newest"
            )
    elif own:
        log.info("resume: %s has checkpoints of its own, which go before %s", run_dir, named)
        yield from read_checkpoints(run_dir)
    saved = _named(named, "resume")
    yield saved
    raise ConfigError(f"resume: {saved.path}: the run had diverged there; name an earlier checkpoint")


def starting_points_of(config: TrainConfig, world: World) -> Iterator[SavedCheckpoint]:
    """`starting_points` as the first rank finds them; each of the others reads the same files.

    Raises:
        CheckpointError: this rank reads another content, or none.
    """
    found: list[SavedCheckpoint] = []

    def paths() -> Iterator[Path]:
        for saved in starting_points(config):
            found[:] = [saved]
            yield saved.path

    for path in world.told(paths()):
        yield found.pop() if world.leads else read_checkpoint(path)


def load_initial_weights(model: M4, config: TrainConfig) -> None:
    """Give a model the weights of ``init_from`` (a run, a checkpoint, or a file of nano4M's), if there is any.

    Raises:
        ConfigError, CheckpointError: naming ``init_from``; it is not there, damaged, or of another model.
    """
    if config.init_from is None:
        return
    source = Path(config.init_from)
    try:
        if source.is_file():
            load_matching(load_nano4m(source, model.config).state_dict(), model, str(source))
        else:
            saved = _named(source, "init_from")
            source = saved.path
            load_matching(saved.weights, model, str(source))
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {str(error).removeprefix('init_from: ')}") from error
    log.info("init_from: the weights are those of %s; optimiser, schedule and data begin anew", source)


def _named(path: Path, key: str) -> SavedCheckpoint:
    """A checkpoint folder, or the newest whole one of a run directory."""
    if (path / META_FILE).is_file():
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from None
    if not path.is_dir():
        kinds = "a checkpoint folder, a run directory or a file of weights (.safetensors, .pth)"
        if key == "resume":
            kinds = "auto, never, a checkpoint folder or a run directory"
        raise ConfigError(f"{key}: expected {kinds}; {path} is {'a file' if path.exists() else 'not there'}")
    newest = next(read_checkpoints(path), None)
    if newest is None:
        raise ConfigError(f"{key}: {path} is no checkpoint and holds no whole one (checkpoints/step-…)")
    return newest
