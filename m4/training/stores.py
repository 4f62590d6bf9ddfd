"""The data of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from m4.build import data_root, open_split
from m4.config import TrainConfig
from m4.data.layout import read_meta
from m4.data.store import TokenStore
from m4.distributed import World


class Stores(NamedTuple):
    """The packed tokens of a run, and what meta.json says of them, {} where there is none."""

    train: TokenStore
    evaluation: TokenStore
    meta: Mapping[str, Any] = {}

    @classmethod
    def of(cls, config: TrainConfig, world: World) -> Stores:
        """What ``data`` says; the first rank makes what is not there yet, before the others open it."""
        return world.one_first(lambda: cls._open(config))

    @classmethod
    def _open(cls, config: TrainConfig) -> Stores:
        root, data = data_root(config), config.data
        train, evaluation = (open_split(config, root, name) for name in (data.train_split, data.eval_split))
        return cls(train, evaluation, read_meta(root))
