"""From a configuration to the objects of a run: data, masks, model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from m4.config import TrainConfig
from m4.data.layout import read_meta
from m4.data.sample_set import make_sample_set
from m4.data.store import TokenStore, open_store
from m4.distributed import World
from m4.errors import ConfigError
from m4.modalities import IMAGE_LEVELS
from m4.model import M4, ModelConfig
from m4kernels import MaskingSpec

log = logging.getLogger(__name__)


class Stores(NamedTuple):
    """The packed tokens of a run, and what meta.json says of them, {} where there is none."""

    train: TokenStore
    evaluation: TokenStore
    meta: Mapping[str, Any] = {}


def model_config(config: TrainConfig) -> ModelConfig:
    """What `M4` needs to know of a run."""
    return config.model_config()


def build_model(config: TrainConfig, device: torch.device, code_levels: Sequence[int] = IMAGE_LEVELS) -> M4:
    """The model with weights drawn from ``seed``, the same on every device.

    code_levels: of the data (`m4.data.tokenizers.code_levels`), for initial values; weights that are loaded afterwards
    need none.
    """
    torch.manual_seed(config.seed)
    return M4(model_config(config), code_levels).to(device)


def masking_spec(config: TrainConfig) -> MaskingSpec:
    """The masking rule of a run."""
    return config.masking_spec()


def data_root(config: TrainConfig) -> Path:
    """Where a run trains: ``data.root``, or the embedded sample set, which is made if it is not there yet."""
    if config.data.root is not None:
        root = Path(config.data.root)
        if not root.is_dir():
            found = "is not a folder" if root.exists() else "is not there"
            raise ConfigError(
                f"data.root: {root} {found}; prepare it with python -m m4.data prepare, "
                "or set data.root=null for the embedded sample set"
            )
        return root
    root = Path(config.data.sample_dir)
    log.info(
        "data.root is null: training on the EMBEDDED SAMPLE SET in %s (small, synthetic; set data.root to train on "
        "your own data)",
        root,
    )
    return make_sample_set(root, config.data.sample_videos)


def open_split(config: TrainConfig, root: Path, split: str) -> TokenStore:
    """The packed tokens of one split."""
    cache = None if config.data.cache_dir is None else Path(config.data.cache_dir)
    return open_store(root, split, config.modalities, config.vocab_sizes, config.max_seq_lens, cache_dir=cache)


def open_stores(config: TrainConfig, world: World | None = None) -> Stores:
    """Both splits of a run, where ``data`` says; the first rank makes what is not there yet, before others open it."""

    def opened() -> Stores:
        root, data = data_root(config), config.data
        train, evaluation = (open_split(config, root, name) for name in (data.train_split, data.eval_split))
        return Stores(train, evaluation, read_meta(root))

    return (world or World()).one_first(opened)
