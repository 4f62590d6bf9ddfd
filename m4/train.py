"""Train M4: ``python -m m4.train --config M4-config.yaml [key=value …]``."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

from m4.arguments import CommandParser
from m4.cli import python_command, run_command
from m4.config import load_config
from m4.device import device_of_rank
from m4.distributed import World, leave
from m4.errors import ConfigError
from m4.run.directory import check_not_moved
from m4.training.plan import dry_run
from m4.training.trainer import Trainer

log = logging.getLogger("m4.train")


def main() -> int:
    parser = CommandParser(prog="python -m m4.train", description="Train M4, or resume where it stopped.")
    parser.add_argument("--config", required=True, type=Path, help="YAML file: flat, or nested as nano4M's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example lr=0.001 model.dim=128")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run comes to, check a batch, write nothing"
    )
    arguments = parser.parse_intermixed_args()
    config, notes = load_config(arguments.config, arguments.overrides)
    check_not_moved(arguments.config, config, arguments.overrides)
    for note in notes:
        log.info("%s", note)
    world = World.from_environment()
    if arguments.dry_run:
        if world.size > 1:
            raise ConfigError(
                f"--dry-run: works in one process, this is one of {world.size} (WORLD_SIZE); give it without torchrun"
            )
        print(dry_run(config))
        return 0
    device = device_of_rank(config.device, world)
    command = shlex.join([*_launcher(world), "-m", "m4.train", *sys.argv[1:]])
    with world.joined(config.rank_timeout, device.type) as joined:
        status = Trainer(config, device=device, world=joined).run(command)
    if world.size > 1:
        leave(status)
    return status


def _launcher(world: World) -> list[str]:
    """How this run was started, without what is said of machines that meet."""
    if world.size == 1:
        return [python_command()]
    machines = world.size // world.local_size
    nodes = [f"--nnodes={machines}"] if machines > 1 else []
    return ["torchrun", *nodes, f"--nproc-per-node={world.local_size}"]


if __name__ == "__main__":
    run_command(main)
