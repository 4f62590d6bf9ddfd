"""From a configuration to the objects of a run: data, masks, model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from m4.config import TrainConfig
from m4.data.sample_set import make_sample_set
from m4.data.store import TokenStore, open_store
from m4.errors import ConfigError
from m4.model import M4, AttentionConfig, ModelConfig
from m4kernels import MaskingSpec

log = logging.getLogger(__name__)


def model_config(config: TrainConfig) -> ModelConfig:
    """What `M4` needs to know of a run."""
    return ModelConfig(
        modalities=config.modalities,
        vocab_sizes=config.vocab_sizes,
        max_seq_lens=config.max_seq_lens,
        dim=config.model.dim,
        enc_depth=config.model.enc_depth,
        dec_depth=config.model.dec_depth,
        head_dim=config.model.head_dim,
        mlp_ratio=config.model.mlp_ratio,
        attention=AttentionConfig(**(config.model.attention or {})),
        kernels=config.kernels,
    )


def build_model(config: TrainConfig, device: torch.device) -> M4:
    """The model with weights drawn from ``seed``, the same on every device."""
    torch.manual_seed(config.seed)
    return M4(model_config(config)).to(device)


def masking_spec(config: TrainConfig) -> MaskingSpec:
    """The masking rule of a run."""
    return MaskingSpec(
        max_seq_lens=tuple(config.max_seq_lens),
        input_alphas=tuple(config.input_alphas),
        target_alphas=tuple(config.target_alphas),
        input_tokens_range=(config.input_tokens_range[0], config.input_tokens_range[1]),
        target_tokens_range=(config.target_tokens_range[0], config.target_tokens_range[1]),
    )


def data_root(config: TrainConfig) -> Path:
    """Where a run trains: ``data.root``, or the embedded sample set, which is made if it is not there yet."""
    if config.data.root is not None:
        root = Path(config.data.root)
        if not root.is_dir():
            raise ConfigError(
                f"data.root: {root} is not there; prepare it with python -m m4.data prepare, "
                "or set data.root=null for the embedded sample set"
            )
        return root
    root = Path(config.data.sample_dir)
    log.info(
        "data.root is null: training on the EMBEDDED SAMPLE SET in %s (small, synthetic; set data.root to train on "
        "your own data)",
        root,
    )
    return make_sample_set(root)


def open_split(config: TrainConfig, root: Path, split: str) -> TokenStore:
    """The packed tokens of one split."""
    cache = None if config.data.cache_dir is None else Path(config.data.cache_dir)
    return open_store(root, split, config.modalities, config.vocab_sizes, config.max_seq_lens, cache_dir=cache)
