"""The run's configuration: names, defaults, and what has to hold before any work is done.

`m4.config_yaml` reads and merges, `m4.config_values` says how a value is read by the type of its key, `m4.config_keys`
which keys there are. The rules of the model, of the masks and of the schedule are those of the classes that are built
from it here; only what belongs to none of them is checked in this file.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from m4.compat import nano4m_config
from m4.config_keys import given_twice, leaves, schema, sections, unknown_key
from m4.config_values import (
    Duration,
    Patterns,
    describe,
    format_duration,
    is_scalar,
    parse_duration,
    read_value,
    shortened,
    shown,
)
from m4.config_yaml import read_tree, to_yaml
from m4.device import DEVICE_NAME, DEVICE_NAMES, TRAINING_DTYPES
from m4.errors import ConfigError
from m4.modalities import RowLayout
from m4.model.config import AttentionConfig, ModelConfig
from m4.schedule import FLOAT32, ONE_TOKEN, LearningRate, Schedule, total_samples
from m4kernels import MaskingSpec

__all__ = [
    "ConfigError",
    "DataSection",
    "LogSection",
    "ModelSection",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "format_duration",
    "load_config",
    "parse_duration",
]

# Of training samples. "feistel": a permutation by function, which holds no array. "sorted": that of runs begun before
# it, kept so that they can go on; it holds one number a row.
ORDERS = ("feistel", "sorted")
_REFERENCE_TIME = Duration("14:34:45")  # of the M4 recipe on 4 × V100
_MOST_IDS = 65536  # of a modality: tokens are stored in 16 bits
RESUME_WORDS = ("auto", "never")  # resume: anything else is a path
_NAME_BYTES = 255  # what file systems allow a folder's name

# What null stands for, for the keys that may be null.
_NULL_MEANS = {
    "coords_lr_scale": "as vocab_lr_scale",
    "clip_grad": "no clipping",
    "training_time": "no comparison",
    "eval_samples": "all of the split",
    "stop_after_steps": "train to the end",
    "init_from": "initial values by model.init",
    "model.attention": "full attention",
    "data.root": "the sample set",
    "data.cache_dir": "next to the data",
    "log.peak_tflops": "measured",
    "log.wandb_entity": "your own",
    "log.wandb_run_name": "run_name",
}

_Built = TypeVar("_Built")


@dataclass
class ModelSection:
    """Size of the model, see `m4.model.config.ModelConfig`; what it reads and predicts is at the top level."""

    dim: int = ModelConfig.dim
    enc_depth: int = ModelConfig.enc_depth
    dec_depth: int = ModelConfig.dec_depth
    head_dim: int = ModelConfig.head_dim
    mlp_ratio: float = ModelConfig.mlp_ratio
    init: str = ModelConfig.init  # fourier, or nano4M's normal
    attention: Patterns | None = None  # {encoder, decoder, cross: full | within_modality | [[…]]}; null: full


@dataclass
class DataSection:
    """Where the tokens come from. ``root: null`` is the embedded sample set, made in ``sample_dir``."""

    root: str | None = None
    sample_dir: str = "data/sample"
    sample_videos: int = 150
    cache_dir: str | None = None  # null: next to the data
    train_split: str = "train"
    eval_split: str = "eval"
    mirror: bool = False  # training samples left to right, one in two
    order: str = ORDERS[0]  # of the training samples; sorted: that of runs begun before there was a choice


@dataclass
class LogSection:
    """What is written beside ``metrics.jsonl``, and how often (in optimiser steps)."""

    every: int = 1
    peak_tflops: float | None = None  # of a device, for mfu; null: measured
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "m4"
    wandb_entity: str | None = None
    wandb_run_name: str | None = None  # null: run_name


@dataclass
class TrainConfig:
    """One training run. The defaults are those of ``M4-config.yaml``; tokens are in millions of counted tokens.

    Raises:
        ConfigError: naming the first key whose value cannot be run, the value, and what is expected.
    """

    modalities: list[str] = field(default_factory=lambda: ["tok_rgb", "coords", "tok_rgb_next", "coords_next"])
    vocab_sizes: list[int] = field(default_factory=lambda: [65536, 65536, 65536, 65536])
    max_seq_lens: list[int] = field(default_factory=lambda: [256, 39, 256, 39])
    input_alphas: list[float] = field(default_factory=lambda: [1.5, 1.5, 0.5, 0.5])
    target_alphas: list[float] = field(default_factory=lambda: [0.5, 0.5, 1.5, 1.5])
    input_tokens_range: list[int] = field(default_factory=lambda: [96, 256])
    target_tokens_range: list[int] = field(default_factory=lambda: [39, 256])

    batch_size: int = 96  # samples a device and forward pass
    global_batch_size: int = 512  # samples an optimiser step; reached by accumulation
    total_tokens: float = 3000.0
    token_warmup: float = 500.0
    num_tokens_per_sample: int = 256
    lr: float = 0.002
    min_lr: float = 1e-7
    vocab_lr_scale: float = 1.0  # of the token embedding and the output layer, beside lr
    coords_lr_scale: float | None = None  # of their rows that are coordinate bins; null: as vocab_lr_scale
    vocab_eps: float = 1e-8  # of Adam, for the token embedding and the output layer
    weight_decay: float = 0.05
    optimizer: str = "adamw"  # or muon: for the matrices of the trunk
    ema: float = 0.0  # decay of the averaged weights; 0: none
    clip_grad: float | None = 1.0
    skip_non_finite: int = 0  # steps of the run whose loss or gradient may not be finite: they do not update
    dtype: str = "fp32"
    training_time: Duration | None = _REFERENCE_TIME  # reference wall clock, for comparison only

    eval_freq: float = 25.0
    eval_samples: int | None = 512  # the first rows of the evaluation split; null: all of it
    eval_seed: int = 0
    eval_generate_samples: int = 16  # of which the next moment is predicted and compared; 0: none
    save_ckpt_freq: float = 1000.0
    keep_ckpts: int = 3  # the newest …
    keep_best: int = 1  # … and so many with the lowest evaluation losses
    async_checkpoints: bool = True  # a thread writes them from a copy, while training goes on
    resume: str = "auto"  # auto, never, or a checkpoint or run to go on from
    init_from: str | None = None  # weights to start from: a run, a checkpoint or a nano4M file
    stop_after_steps: int | None = None  # save and stop there, with the schedule left as it is

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    log: LogSection = field(default_factory=LogSection)

    seed: int = 0
    run_name: str = "auto"  # auto: the name of the configuration file
    output_dir: str = "runs"
    device: str = "auto"
    compile: bool = False
    cuda_graphs: str = "auto"  # auto, on, off: capture the step on a GPU
    kernels: str = ModelConfig.kernels
    activation_checkpointing: bool = ModelConfig.activation_checkpointing
    profile: bool = False  # trace a few steps
    parallel: str = "ddp"  # with several ranks: ddp, the model on each of them, or fsdp, divided over them
    rank_timeout: float = 600.0  # seconds without progress after which a rank counts as hung

    def __post_init__(self) -> None:
        for key, kind in _schema().items():
            section, _, name = key.rpartition(".")
            place = getattr(self, section) if section else self
            if section and not isinstance(place, _sections()[section]):
                raise ConfigError(_unknown_key(section, place))
            setattr(place, name, _read(key, kind, getattr(place, name)))
        _check(self)

    @property
    def run_dir(self) -> Path:
        """Folder of the run. Raises ConfigError: run_name is not the name of a folder in output_dir."""
        _check_run_name(self.run_name)
        return Path(self.output_dir) / self.run_name

    @property
    def total_samples(self) -> int:
        """Samples that make up ``total_tokens``."""
        return total_samples(self)

    @property
    def training_seconds(self) -> int | None:
        """``training_time`` in seconds."""
        return None if self.training_time is None else parse_duration(self.training_time)

    def model_config(self) -> ModelConfig:
        """What `m4.model.M4` needs to know of a run. Raises ValueError, which begins with the name of what is wrong."""
        section = {leaf.name: getattr(self.model, leaf.name) for leaf in dataclasses.fields(self.model)}
        section["attention"] = AttentionConfig.of(self.model.attention)
        section |= {"kernels": self.kernels, "activation_checkpointing": self.activation_checkpointing}
        return ModelConfig(self.modalities, self.vocab_sizes, self.max_seq_lens, **section)

    def masking_spec(self) -> MaskingSpec:
        """The masking rule of a run. Raises ValueError, which begins with the name of what is wrong."""
        lists = {name: tuple(getattr(self, name)) for name in (leaf.name for leaf in dataclasses.fields(MaskingSpec))}
        return MaskingSpec(**lists)


def load_config(path: str | Path, overrides: list[str] | None = None) -> tuple[TrainConfig, list[str]]:
    """Read a flat or nested (nano4M) YAML file, apply ``key=value`` overrides, check everything.

    Returns:
        The configuration and one line for each key that is not ours, saying how it was read.
    Raises:
        ConfigError: naming the key, its value, and what is expected or the nearest known key.
    """
    path, overrides = Path(path), overrides or []
    tree, overridden = read_tree(path, overrides, _is_scalar)
    try:
        flat, notes = nano4m_config.translate(tree, overridden, lambda key, value: read_value(_schema()[key], value))
    except nano4m_config.TranslationError as error:
        raise ConfigError(f"{path}: {error}") from None
    notes += given_twice(overrides)
    if flat.get("run_name", "auto") == "auto":
        flat["run_name"] = _name_of(path)
    return config_from_dict(flat), notes


def config_from_dict(tree: dict[str, Any]) -> TrainConfig:
    """A checked configuration from a nested dict of our own keys; see `load_config` for the errors."""
    if not isinstance(tree, dict):
        raise ConfigError(f"expected a configuration with keys, got {shown(tree)}")
    values: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {name: {} for name in _sections()}
    for key, value in leaves(tree, _schema()).items():
        if key not in _schema():
            raise ConfigError(_unknown_key(key, value))
        section, _, name = key.rpartition(".")
        # Read before the sections are made, so that a value is named by its whole key.
        (sections[section] if section else values)[name] = _read(key, _schema()[key], value)
    return TrainConfig(**values, **{name: _sections()[name](**inside) for name, inside in sections.items()})


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested dict of all keys; `config_from_dict` gives the same configuration back."""
    return dataclasses.asdict(config)


def config_to_yaml(config: TrainConfig) -> str:
    """YAML text of all keys, resolved; loading it gives the same configuration."""
    return to_yaml(config_to_dict(config))


def _read(key: str, kind: Any, value: Any) -> Any:
    """The value as the key's type says."""
    if isinstance(value, str) and not value:
        instead = f"null means {_NULL_MEANS[key]}" if key in _NULL_MEANS else f"expected {describe(kind)}"
        raise ConfigError(f"{key} is empty; {instead}")
    try:
        return read_value(kind, value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _schema() -> dict[str, Any]:
    """Dotted key → type, of every leaf."""
    return schema(TrainConfig)


def _sections() -> dict[str, Any]:
    """Name → class, of every section."""
    return sections(TrainConfig)


def _is_scalar(key: str) -> bool:
    """Whether a key, ours or one that nano4M maps to ours, holds one word."""
    kind = _schema().get(nano4m_config.our_key(key))
    return kind is not None and is_scalar(kind)


def _unknown_key(key: str, value: Any) -> str:
    return unknown_key(TrainConfig, key, value, nano4m_config.KNOWN_KEYS)


def _name_of(path: Path) -> str:
    """The run's name when none is given: that of the file, or of the folder of a saved ``config.yaml``."""
    path = Path(os.path.abspath(path))
    name = path.parent.name if path.name == "config.yaml" else path.stem
    origin = path.parent if path.name == "config.yaml" else path
    _check_run_name(name, f", which is the name of {shortened(str(origin))}")
    return name


def _check_run_name(name: str, origin: str = "") -> None:
    if not re.fullmatch(r"\w([\w .,:=@+-]*[\w.,:=@+-])?", name) or len(name.encode()) > _NAME_BYTES:
        raise ConfigError(
            f"run_name: expected the name of a folder (letters, digits, inner spaces and _ . , : = @ + -, the first a "
            f"letter, digit or _; at most {_NAME_BYTES} bytes), got {shown(name)}{origin}; set run_name=NAME"
        )


def _build(make: Callable[[], _Built]) -> _Built:
    """What ``make`` returns; its ValueError, which begins with the name of an argument, as one that names our key."""
    try:
        return make()
    except ValueError as error:
        name, _, said = str(error).removeprefix("MaskingSpec: ").partition(" ")
        key = f"model.{name}" if f"model.{name.partition('.')[0]}" in _schema() else name
        raise ConfigError(f"{key}: {shortened(said)}") from None


def _check(c: TrainConfig) -> None:
    """Raise on the first value that cannot be run."""

    def require(holds: bool, key: str, expected: str) -> None:
        if not holds:
            value: Any = c
            for part in key.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{key}: expected {expected}, got {shown(value)}")

    _build(c.model_config)
    _build(c.masking_spec)
    _build(lambda: Schedule.of(c, world_size=1))
    _build(lambda: LearningRate.of(c))
    require(max(c.vocab_sizes) <= _MOST_IDS, "vocab_sizes", f"values in 1 … {_MOST_IDS} (ids are stored in 16 bits)")
    longest = sum(c.max_seq_lens)
    for side in ("input_tokens_range", "target_tokens_range"):
        lowest, highest = getattr(c, side)
        require(lowest >= 1, side, "a lowest value of at least 1")
        require(highest <= longest, side, f"a highest value of at most {longest}, the sum of max_seq_lens")
        # Segments count the tokens of a batch in 32 bits.
        require(c.batch_size * highest < 2**31, "batch_size", f"at most {(2**31 - 1) // highest} with this {side}")
    for key in ("eval_freq", "save_ckpt_freq"):
        require(getattr(c, key) >= ONE_TOKEN, key, f"a value above 0, at least {ONE_TOKEN:g} millions, one token")
    least, most = FLOAT32
    require(0 <= c.weight_decay <= most, "weight_decay", f"a value in 0 … {most:g}")
    require(0 < c.vocab_lr_scale <= 1000, "vocab_lr_scale", "a value above 0 and at most 1000")
    of_bins, as_others = c.coords_lr_scale, f"null: {_NULL_MEANS['coords_lr_scale']}"
    require(
        of_bins is None or 0 < of_bins <= 1000, "coords_lr_scale", f"a value above 0 and at most 1000, or {as_others}"
    )
    require(
        of_bins is None or RowLayout.of(c).bins > 0,
        "coords_lr_scale",
        f"{as_others}, in a run whose modalities have no coordinates",
    )
    require(least <= c.vocab_eps <= 1, "vocab_eps", f"a value in {least:g} … 1")
    require(
        c.clip_grad is None or least <= c.clip_grad <= most, "clip_grad", f"a value in {least:g} … {most:g}, or null"
    )
    for key in ("keep_ckpts", "eval_samples", "stop_after_steps"):
        or_null = f", or null: {_NULL_MEANS[key]}" if key in _NULL_MEANS else ""
        require(getattr(c, key) is None or getattr(c, key) > 0, key, f"a value above 0{or_null}")
    require(c.data.sample_videos > 0, "data.sample_videos", "a value above 0")
    require(c.log.every > 0, "log.every", "a value above 0")
    peak = c.log.peak_tflops
    require(peak is None or 0 < peak <= 1e9, "log.peak_tflops", "TFLOP/s above 0 and at most 1e9, or null: measured")
    for key in ("seed", "eval_seed"):
        require(getattr(c, key) >= 0, key, "a value in 0 … 2^63 - 1")
    for key in ("eval_generate_samples", "keep_best"):
        require(getattr(c, key) >= 0, key, "a value of at least 0, which means none")
    require(0 <= c.skip_non_finite <= 1000, "skip_non_finite", "a value in 0 … 1000")
    require(c.resume in RESUME_WORDS or c.init_from is None, "init_from", "null with resume=PATH, which has weights")

    require(0 <= c.ema < 1, "ema", "a value of at least 0, which means none, and below 1")
    require(c.optimizer in ("adamw", "muon"), "optimizer", "adamw or muon")
    require(c.dtype in TRAINING_DTYPES, "dtype", " or ".join(TRAINING_DTYPES))
    require(c.data.order in ORDERS, "data.order", " or ".join(ORDERS))
    require(c.cuda_graphs in ("auto", "on", "off"), "cuda_graphs", "auto, on or off")
    require(c.parallel in ("ddp", "fsdp"), "parallel", "ddp or fsdp")
    require(1 <= c.rank_timeout <= 1e6, "rank_timeout", "seconds in 1 … 1e6")
    require(DEVICE_NAME.fullmatch(c.device) is not None, "device", DEVICE_NAMES)
    _check_run_name(c.run_name)
    require(not (c.log.wandb and ":" in c.run_name), "run_name", "a name without : for log.wandb, which takes none")
