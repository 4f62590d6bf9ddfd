"""The keys of a configuration class: dotted names and their types, and what to say of a name that is none of them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable
from typing import Any, get_type_hints

from m4.config_values import shortened, shown
from m4.errors import ConfigError

# What other trainers call our keys.
_OTHER_WORDS = {
    "learning_rate": "lr",
    "min_learning_rate": "min_lr",
    "epochs": "total_tokens",
    "num_epochs": "total_tokens",
    "max_steps": "stop_after_steps",
    "warmup_steps": "token_warmup",
    "gradient_clipping": "clip_grad",
    "gradient_checkpointing": "activation_checkpointing",
    "pretrained": "init_from",
    "ema_decay": "ema",
    "precision": "dtype",
    "data_path": "data.root",
    "dataset": "data.root",
    "use_wandb": "log.wandb",
}


@functools.cache
def schema(cls: type) -> dict[str, Any]:
    """Dotted key → type, of every leaf of a configuration class."""
    leaves: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        if name in sections(cls):
            leaves.update({f"{name}.{inner}": inner_kind for inner, inner_kind in get_type_hints(kind).items()})
        else:
            leaves[name] = kind
    return leaves


@functools.cache
def sections(cls: type) -> dict[str, Any]:
    """Name → class, of every section of a configuration class."""
    return {name: kind for name, kind in get_type_hints(cls).items() if dataclasses.is_dataclass(kind)}


def leaves(tree: dict[Any, Any], known: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of a nested dict, descending only into sections (or, for unknown keys, all the way).

    Raises ConfigError: a key is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        inside = isinstance(value, dict) and value and dotted not in known
        for name, leaf in (leaves(value, known, f"{dotted}.") if inside else {dotted: value}).items():
            if name in found:
                raise ConfigError(f"{name}: given twice")
            found[name] = leaf
    return found


def unknown_key(cls: type, key: str, value: Any, also_known: list[str]) -> str:
    """What to say of a key that a configuration class does not have; a section is told what is in it."""
    known = list(schema(cls)) + also_known
    if key in sections(cls):
        inside = ", ".join(name.split(".")[1] for name in schema(cls) if name.startswith(f"{key}."))
        return f"{key}: expected a section with the keys {inside}, got {shown(value)}"
    # A key on the wrong level (dim for model.dim) is as likely as a slip of the pen.
    nearest = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    words = {name: name for name in known} | _OTHER_WORDS
    nearest = nearest or [words[word] for word in difflib.get_close_matches(key, words, n=1, cutoff=0.0)]
    return f"{shortened(key)}: unknown key (value {shown(value)}); the nearest known key is {nearest[0]}"


def given_twice(overrides: list[str]) -> list[str]:
    """A line for each key that the command line gives more than once."""
    keys = [text.partition("=")[0] for text in overrides]
    return [
        f"{key}: given {keys.count(key)} times on the command line; the last one counts"
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1
    ]
