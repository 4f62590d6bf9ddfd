"""Read the nested nano4M YAML: which of its keys become ours, which say nothing here, which cannot be honoured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from m4.config_values import read_value, shown


class TranslationError(ValueError):
    """A nano4M key whose value contradicts another one, or asks for something this trainer does not do."""


_DATA_KEYS = (
    "modalities",
    "vocab_sizes",
    "max_seq_lens",
    "input_alphas",
    "target_alphas",
    "input_tokens_range",
    "target_tokens_range",
)

# nano4M key → our key. Several may lead to one of ours; they must then agree.
_MAPPED = {f"global_vars.{key}": key for key in ("batch_size", *_DATA_KEYS)}
_MAPPED |= {f"model_config.{key}": key for key in ("modalities", "vocab_sizes", "max_seq_lens")}
_MAPPED |= {f"model_config.{key}": f"model.{key}" for key in ("dim", "enc_depth", "dec_depth", "head_dim", "mlp_ratio")}
_MAPPED |= {f"model_config.{key}": key for key in ("kernels", "activation_checkpointing")}  # of our FourM alone
_MAPPED |= {f"{loader}_loader_config.{key}": key for loader in ("train", "eval") for key in _DATA_KEYS}
_MAPPED |= {
    "warmup_tokens": "token_warmup",
    "log_wandb": "log.wandb",
    "wandb_project": "log.wandb_project",
    "wandb_entity": "log.wandb_entity",
    "wandb_run_name": "log.wandb_run_name",
    "train_loader_config.batch_size": "batch_size",
    "train_loader_config.root_dir": "data.root",
    "eval_loader_config.root_dir": "data.root",
    "train_loader_config.split": "data.train_split",
    "eval_loader_config.split": "data.eval_split",
    "model_config.attention": "model.attention",
    "train_loader_config.seed": "seed",
    "eval_loader_config.seed": "eval_seed",
    "train_loader_config.cache_dir": "data.cache_dir",
    "eval_loader_config.cache_dir": "data.cache_dir",
}

# nano4M key → why nothing has to be done.
_IGNORED = {"model_config._target_": "the model is always m4.model.M4"}
_IGNORED |= {
    f"{loader}_loader_config.{key}": why
    for loader in ("train", "eval")
    for key, why in {
        "_target_": "the data is always read by m4.data.store",
        "sample_from_k_augmentations": "the token store decides how an augmentation axis is read",
        "text_tokenizer_path": "no modality here is tokenised text",
        "text_max_length": "no modality here is tokenised text",
        "infinite": "training always streams without end, evaluation reads each row once",
        "num_workers": "masks are drawn in the training process",
        "pin_memory": "batches come from a memory-mapped file",
        "shuffle": "training is always shuffled, evaluation never",
        "drop_last": "the training stream has no last batch, evaluation keeps it",
        "distributed": "the launcher decides it",
        "include_unmasked_data_dict": "masked batches are all that training reads",
    }.items()
}
_IGNORED["eval_loader_config.batch_size"] = "evaluation uses batch_size"

# nano4M key → the one value that is meant here.
_FIXED: dict[str, tuple[bool | int | float, str]] = {
    "model_config.per_modality_loss_avg": (True, "the loss is the mean over the modalities"),
    "model_config.use_bias": (False, "the layers have no biases"),
    "model_config.padding_idx": (-100, "nothing else fills the padding of targets"),
    "model_config.init_std": (0.02, "model.init decides the initial values"),
}
for _loader in ("train", "eval"):
    _FIXED[f"{_loader}_loader_config.overlap_vocab"] = (True, "all modalities share one embedding table")
    _FIXED[f"{_loader}_loader_config.overlap_posembs"] = (True, "positions restart at 0 in every modality")

_SECTIONS = ("global_vars", "model_config", "train_loader_config", "eval_loader_config")
KNOWN_KEYS = sorted({*_MAPPED, *_IGNORED, *_FIXED})


def our_key(key: str) -> str:
    """Our key that a nano4M key is read as; any other key is returned as it is."""
    return _MAPPED.get(key, key)


def translate(
    tree: dict[str, Any], overridden: set[str], read: Callable[[str, Any], Any]
) -> tuple[dict[str, Any], list[str]]:
    """Turn a nested nano4M configuration into ours; a flat one passes through unchanged.

    Args:
        tree: the YAML with overrides applied and interpolations resolved.
        overridden: dotted keys given on the command line; they win over what they contradict.
        read: the value of one of our keys by its type; raises ValueError saying what is expected.
    Returns:
        Nested dict of our keys (unknown ones left for the caller to refuse), and one line a nano4M key.
    Raises:
        TranslationError: two keys that disagree, or a value that this trainer does not do.
    """
    ours: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    for key, value in tree.items():
        if key in _SECTIONS and isinstance(value, dict):
            foreign.update({f"{key}.{inner}": inner_value for inner, inner_value in value.items()})
        elif key in _MAPPED:
            foreign[key] = value
        else:
            ours[key] = value
    notes: list[str] = []
    origin: dict[str, str] = {}  # our key → the nano4M key it was read from
    for key, value in foreign.items():
        if key in _MAPPED:
            notes.append(_take(ours, origin, key, value, overridden, read))
        elif key in _IGNORED:
            notes.append(f"{key}: ignored, because {_IGNORED[key]}")
        elif key in _FIXED:
            wanted, meaning = _FIXED[key]
            word = str(wanted).lower()
            if _typed_as(wanted, value) != wanted:
                raise TranslationError(f"{key}: expected {word} ({meaning}), got {shown(value)}")
            notes.append(f"{key}: {word}, as it always is here: {meaning}")
        elif key.startswith("model_config.") and key.endswith("_read_key"):
            notes.append(f"{key}: ignored, because a masked batch has fixed field names")
        elif key.startswith("global_vars."):
            notes.append(f"{key}: used for interpolation only")
        else:
            ours[key] = value  # unknown: the caller names it and the nearest known key
    if foreign:
        _settle_output_dir(ours, notes)
    return ours, notes


def _typed_as(wanted: bool | int | float, value: Any) -> bool | int | float | None:
    """The value in the type of the wanted one, None where it is of another."""
    try:
        return read_value(type(wanted), value)
    except ValueError:
        return None


def _take(
    ours: dict[str, Any],
    origin: dict[str, str],
    source: str,
    value: Any,
    overridden: set[str],
    read: Callable[[str, Any], Any],
) -> str:
    """Set our key from a nano4M key, unless the two disagree; the command line wins. Returns the line to log."""
    target = _MAPPED[source]
    section, _, leaf = target.rpartition(".")
    place = ours.setdefault(section, {}) if section else ours
    if not isinstance(place, dict):
        raise TranslationError(f"{section}: expected a section of keys, got {shown(place)}")
    first = origin.get(target, target)
    typed = _read(read, source, target, value)
    same = leaf in place and _read(read, first, target, place[leaf]) == typed
    if leaf in place and not same:
        if first in overridden:
            return f"{source}: ignored, because {first} was given on the command line"
        if source not in overridden:
            raise TranslationError(
                f"{source}: {shown(value)} contradicts {first}: {shown(place[leaf])}; make them agree"
            )
    if not same:
        place[leaf] = value
        origin[target] = source
    return f"{source}: read as {target}"


def _read(read: Callable[[str, Any], Any], source: str, target: str, value: Any) -> Any:
    """The value of a key in the file, an error under the name that it has there."""
    if value == "":
        raise TranslationError(f"{source} is empty; give it a value, or write null")
    try:
        return read(target, value)
    except ValueError as error:
        raise TranslationError(f"{source}: {error}") from None


def _settle_output_dir(ours: dict[str, Any], notes: list[str]) -> None:
    """nano4M's output_dir is the folder of one run, ours the folder of all runs: drop a last part that repeats it."""
    folder, name = str(ours.get("output_dir", "")), str(ours.get("run_name", "auto"))
    parent, _, last = folder.rstrip("/").rpartition("/")
    if last in (name, "auto") and folder:
        ours["output_dir"] = parent or ("/" if folder.startswith("/") else ".")
        notes.append(f"output_dir: {folder} read as the folder {ours['output_dir']} with one folder a run in it")
