"""The run's configuration: names, defaults, overrides and every check that needs no data and no model."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from yaml import YAMLError

from m4.compat import nano4m_config
from m4.errors import ConfigError

if TYPE_CHECKING:  # imported where files are parsed: training on a machine that lacks omegaconf needs only the classes
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException


@dataclass
class ModelSection:
    """Size of the model; what it reads and predicts is at the top level."""

    dim: int = 640
    enc_depth: int = 8
    dec_depth: int = 8
    head_dim: int = 64
    mlp_ratio: float = 4.0
    attention: Any = None  # {encoder, decoder, cross: full | within_modality | [[…]]}; null is full everywhere


@dataclass
class DataSection:
    """Where the tokens come from. ``root: null`` is the embedded sample set, made in ``sample_dir``."""

    root: str | None = None
    sample_dir: str = "data/sample"
    cache_dir: str | None = None  # null: next to the data
    train_split: str = "train"
    eval_split: str = "eval"


@dataclass
class LogSection:
    """What is written beside ``metrics.jsonl``, and how often (in optimiser steps)."""

    every: int = 1
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "m4"
    wandb_entity: str | None = None
    wandb_run_name: str | None = None  # null: run_name


@dataclass
class TrainConfig:
    """One training run. The defaults are those of ``M4-config.yaml``; tokens are in millions of counted tokens."""

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
    weight_decay: float = 0.05
    clip_grad: float | None = 1.0
    dtype: str = "fp32"
    training_time: Any = "14:34:45"  # reference wall clock, for comparison only

    eval_freq: float = 25.0
    eval_samples: int | None = 512  # the first rows of the evaluation split; null: all of it
    eval_seed: int = 0
    save_ckpt_freq: float = 1000.0
    keep_ckpts: int = 3
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
    kernels: str = "auto"

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.run_name

    @property
    def total_samples(self) -> int:
        """Samples that make up ``total_tokens``."""
        return math.ceil(self.total_tokens * 1e6 / self.num_tokens_per_sample)

    @property
    def training_seconds(self) -> int | None:
        """``training_time`` in seconds."""
        return None if self.training_time is None else parse_duration(self.training_time)


def load_config(path: str | Path, overrides: list[str] | None = None) -> tuple[TrainConfig, list[str]]:
    """Read a flat or nested (nano4M) YAML file, apply ``key=value`` overrides, check everything.

    Returns:
        The configuration and one line for each key that is not ours, saying how it was read.
    Raises:
        ConfigError: naming the key, its value, and what is expected or the nearest known key.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        raw = OmegaConf.load(path)
        if not isinstance(raw, DictConfig):
            raise ConfigError(f"{path}: expected keys with values at the top level, got {type(raw).__name__}")
        merged: Any = raw
        overridden: set[str] = set()
        for text in overrides or []:
            override = _parse_override(text)
            overridden.update(_leaves(_plain(override)))
            try:
                merged = OmegaConf.merge(merged, override)
            except TypeError:  # a list for a section, or the reverse
                raise ConfigError(f"{text}: the value does not fit what {text.partition('=')[0]} holds") from None
        tree = _plain(merged)
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error})") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_key_of(error)}{str(error).splitlines()[0]}") from None
    try:
        flat, notes = nano4m_config.translate(tree, overridden)
    except nano4m_config.TranslationError as error:
        raise ConfigError(f"{path}: {error}") from None
    config = config_from_dict(flat)
    if config.run_name == "auto":
        config.run_name = path.parent.name if path.name == "config.yaml" else path.stem
    return config, notes


def config_from_dict(tree: dict[str, Any]) -> TrainConfig:
    """A checked configuration from a nested dict of our own keys; see `load_config` for the errors."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    structured = OmegaConf.structured(TrainConfig)
    for key, value in _leaves(tree).items():
        expected = _schema().get(key)
        if expected is None:
            raise ConfigError(_unknown_key(key, value))
        try:
            OmegaConf.update(structured, key, value)
        except OmegaConfBaseException:
            raise ConfigError(f"{key}: expected {_describe(expected)}, got {value!r}") from None
    config = OmegaConf.to_object(structured)
    assert isinstance(config, TrainConfig)
    if config.training_time is not None:
        config.training_time = format_duration(parse_duration(config.training_time))
    # YAML 1.1 reads on and off as true and false.
    config.cuda_graphs = {"True": "on", "False": "off"}.get(config.cuda_graphs, config.cuda_graphs)
    _check(config)
    return config


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested dict of all keys; `config_from_dict` gives the same configuration back."""
    return dataclasses.asdict(config)


def config_to_yaml(config: TrainConfig) -> str:
    """YAML text of all keys, resolved; loading it gives the same configuration."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def parse_duration(value: Any) -> int:
    """Seconds of ``'14:34:45'`` or of a number of seconds (what YAML 1.1 makes of an unquoted 14:34:45)."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+):([0-5]?\d):([0-5]?\d)", value.strip())
        if match:
            hours, minutes, seconds = (int(part) for part in match.groups())
            return hours * 3600 + minutes * 60 + seconds
        if value.strip().isdigit():
            value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"training_time: expected hours:minutes:seconds or a number of seconds, got {value!r}")
    return round(value)


def format_duration(seconds: float) -> str:
    """``H:MM:SS``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _parse_override(text: str) -> DictConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, _ = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ConfigError(f"{text}: expected an override of the form key=value, for example lr=0.001")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{text}: cannot be read: {' '.join(str(error).split())}") from None


def _plain(tree: DictConfig) -> dict[str, Any]:
    """Nested dicts and lists, with interpolations resolved."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(tree, resolve=True)
    return plain


def _leaves(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, descending only into our sections (or, for unknown keys, all the way)."""
    found = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value and dotted not in _schema():
            found.update(_leaves(value, f"{dotted}."))
        else:
            found[dotted] = value
    return found


def _schema() -> dict[str, str]:
    """Dotted key → annotated type, of every leaf."""
    leaves: dict[str, str] = {}
    for top in dataclasses.fields(TrainConfig):
        if isinstance(top.default_factory, type) and dataclasses.is_dataclass(top.default_factory):
            inside = dataclasses.fields(top.default_factory)
            leaves.update({f"{top.name}.{leaf.name}": str(leaf.type) for leaf in inside})
        else:
            leaves[top.name] = str(top.type)
    return leaves


def _describe(annotation: str) -> str:
    words = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}
    words |= {
        f"list[{name}]": f"a list of {plural}"
        for name, plural in (("int", "integers"), ("float", "numbers"), ("str", "names"))
    }
    base = annotation.removesuffix(" | None")
    return words.get(base, base) + (" or null" if base != annotation else "")


def _unknown_key(key: str, value: Any) -> str:
    known = list(_schema()) + nano4m_config.KNOWN_KEYS
    sections = {name.split(".")[0] for name in _schema() if "." in name}
    if key in sections:
        inside = ", ".join(name.split(".")[1] for name in _schema() if name.startswith(f"{key}."))
        return f"{key}: expected a section with the keys {inside}, got {value!r}"
    # A key on the wrong level (dim for model.dim) is as likely as a slip of the pen.
    nearest = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    nearest = nearest or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{key}: unknown key (value {value!r}); the nearest known key is {nearest[0]}"


def _key_of(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    return f"{key}: " if key else ""


def _check(c: TrainConfig) -> None:
    """Raise on the first value that cannot be run."""

    def require(holds: bool, key: str, expected: str) -> None:
        if not holds:
            value: Any = c
            for part in key.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{key}: expected {expected}, got {value!r}")

    def finite(x: float) -> bool:
        return math.isfinite(x)

    names = ", ".join(c.modalities)
    require(len(c.modalities) > 0, "modalities", "at least one modality")
    require(len(set(c.modalities)) == len(c.modalities), "modalities", "every modality once")
    for key in ("vocab_sizes", "max_seq_lens", "input_alphas", "target_alphas"):
        expected = f"{len(c.modalities)} values, one a modality ({names})"
        require(len(getattr(c, key)) == len(c.modalities), key, expected)
    require(
        all(0 < v <= 65536 for v in c.vocab_sizes), "vocab_sizes", "values in 1 … 65536 (ids are stored in 16 bits)"
    )
    require(all(n > 0 for n in c.max_seq_lens), "max_seq_lens", "values above 0")
    total = sum(c.max_seq_lens)
    for side in ("input", "target"):
        alphas, span = getattr(c, f"{side}_alphas"), getattr(c, f"{side}_tokens_range")
        require(all(finite(a) and a >= 0 for a in alphas), f"{side}_alphas", "finite values of at least 0")
        require(any(a > 0 for a in alphas), f"{side}_alphas", "at least one value above 0")
        require(len(span) == 2, f"{side}_tokens_range", "two values, [lowest, highest]")
        require(span[0] >= 1, f"{side}_tokens_range", "a lowest value of at least 1")
        require(span[0] <= span[1], f"{side}_tokens_range", "[lowest, highest] with lowest ≤ highest")
        expected = f"a highest value of at most {total}, the sum of max_seq_lens"
        require(span[1] <= total, f"{side}_tokens_range", expected)

    for key in ("batch_size", "global_batch_size", "num_tokens_per_sample", "keep_ckpts", "log.every"):
        value = c.log.every if key == "log.every" else getattr(c, key)
        require(value > 0, key, "a value above 0")
    for key in ("total_tokens", "eval_freq", "save_ckpt_freq", "lr"):
        require(finite(getattr(c, key)) and getattr(c, key) > 0, key, "a finite value above 0")
    require(finite(c.token_warmup) and c.token_warmup >= 0, "token_warmup", "a finite value of at least 0")
    require(c.token_warmup < c.total_tokens, "token_warmup", f"less than total_tokens ({c.total_tokens:g})")
    require(finite(c.min_lr) and c.min_lr >= 0, "min_lr", "a finite value of at least 0")
    require(c.min_lr <= c.lr, "min_lr", f"at most lr ({c.lr:g})")
    require(finite(c.weight_decay) and c.weight_decay >= 0, "weight_decay", "a finite value of at least 0")
    require(c.clip_grad is None or (finite(c.clip_grad) and c.clip_grad > 0), "clip_grad", "a value above 0, or null")
    require(c.eval_samples is None or c.eval_samples > 0, "eval_samples", "a value above 0, or null for all")
    require(c.stop_after_steps is None or c.stop_after_steps > 0, "stop_after_steps", "a value above 0, or null")
    for key in ("seed", "eval_seed"):
        require(0 <= getattr(c, key) < 2**63, key, "a value in 0 … 2^63 - 1")

    for key in ("dim", "enc_depth", "dec_depth", "head_dim"):
        require(getattr(c.model, key) > 0, f"model.{key}", "a value above 0")
    require(c.model.dim % c.model.head_dim == 0, "model.dim", f"a multiple of head_dim ({c.model.head_dim})")
    require(c.model.dim % 2 == 0, "model.dim", "an even value (sine and cosine halves of the position embedding)")
    require(finite(c.model.mlp_ratio) and c.model.mlp_ratio > 0, "model.mlp_ratio", "a value above 0")

    attention = c.model.attention
    known = isinstance(attention, dict) and set(attention) <= {"encoder", "decoder", "cross"}
    require(attention is None or known, "model.attention", "null, or a section of encoder, decoder and cross")

    require(c.dtype in ("fp32", "bf16"), "dtype", "fp32 or bf16")
    require(c.cuda_graphs in ("auto", "on", "off"), "cuda_graphs", "auto, on or off")
    require(c.kernels in ("auto", "reference", "reference-matmul"), "kernels", "auto, reference or reference-matmul")
    devices = r"auto|cpu|cuda(:\d+)?"
    require(re.fullmatch(devices, c.device) is not None, "device", "auto, cpu, cuda or cuda:INDEX")
    require(
        re.fullmatch(r"[\w.+-]+", c.run_name) is not None, "run_name", "a plain folder name (letters, digits, ._+-)"
    )
    require(c.output_dir != "", "output_dir", "a folder")
    require(c.data.root != "", "data.root", "a folder, or null for the embedded sample set")
