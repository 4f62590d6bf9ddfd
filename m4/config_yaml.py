"""The YAML of configurations: read with every scalar as the text it was written as, merged by OmegaConf, and written.

Types are the business of `m4.config_values`: a YAML reader that decides them first turns a run name 1e3 into a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m4.config_values import shortened, shown
from m4.errors import ConfigError
from m4.extras import extra

with extra("train"):  # every command but those of data comes by here
    import yaml
    from yaml.error import MarkedYAMLError

if TYPE_CHECKING:  # imported where files are parsed: training on a machine that lacks omegaconf needs only the classes
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

_MOST_BYTES = 2_000_000
_MOST_VALUES = 250_000  # of a file; more come from aliases of aliases
_DEEPEST = 32
_NULLS = ("null", "Null", "NULL")  # on the command line; ~ means no value in YAML, but a folder to a shell


class _TextLoader(yaml.SafeLoader):
    """YAML whose scalars stay text: null is None, a value left out is "". A key that is given twice is an error."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise MarkedYAMLError(problem="a key must be a text", problem_mark=key.start_mark)
            line = key.start_mark.line + 1
            if key.value in first:
                problem = f"the key {key.value} is given twice, first in line {first[key.value]}"
                raise MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first[key.value] = line
        return node


def _null(loader: _TextLoader, node: yaml.ScalarNode) -> str | None:
    return None if loader.construct_scalar(node) else ""


for _tag in ("bool", "int", "float", "timestamp", "value", "merge"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_yaml_str)
_TextLoader.add_constructor("tag:yaml.org,2002:null", _null)


class _Quoted(str):
    """Text that is written in double quotes, so that every YAML reader takes it for text."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def read_tree(path: Path, overrides: list[str], is_scalar: Callable[[str], bool]) -> tuple[dict[str, Any], set[str]]:
    """A file with ``key=value`` overrides applied and ``${…}`` resolved.

    Args:
        is_scalar: whether a dotted key holds one word; its override is then taken as typed, not parsed as YAML.
    Returns:
        Nested dicts and lists of text and None, and the dotted keys that were overridden.
    Raises:
        ConfigError: naming the file and the line, the override or the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.create(_read_file(path))
        overridden: set[str] = set()
        for text in overrides:
            overridden |= _apply(merged, text, is_scalar)
        tree: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_key_of(error)}{str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: values refer to each other without end") from None
    return tree, overridden


def to_yaml(tree: dict[str, Any]) -> str:
    """YAML text that `read_tree` reads as the same tree; numbers and flags as their text."""
    return yaml.dump(_quoted(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: expected a YAML file, got a folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: expected a configuration, got a file of more than {_MOST_BYTES:,} bytes")
    try:
        tree = yaml.load(content, _TextLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_problem(error)}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        found = "nested too deeply" if isinstance(error, RecursionError) else f"not a text file ({error})"
        raise ConfigError(f"{path}: {found}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree in (None, "") else "a list" if isinstance(tree, list) else shown(tree)
        raise ConfigError(f"{path}: expected keys with values at the top level (lr: 0.001), got {found}")
    try:
        return _Walk().section(tree)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


class _Walk:
    """Goes through what YAML gave: a key a.b is b in the section a; nothing refers to itself or is of a strange type.

    Raises ValueError naming the key.
    """

    def __init__(self) -> None:
        self._seen = 0

    def section(self, tree: dict[Any, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            if not isinstance(key, str):
                raise ValueError(f"{prefix}{shown(key)}: a key must be a text")
            *sections, name = key.split(".")
            place = found
            for section in sections:
                place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    raise ValueError(f"{prefix}{key}: given twice, as {section} and as {key}")
            value = self._value(value, f"{prefix}{key}", depth + 1)
            inside = place.get(name)
            if isinstance(inside, dict) and isinstance(value, dict) and not inside.keys() & value.keys():
                inside.update(value)
            elif name in place:
                raise ValueError(f"{prefix}{key}: given twice, as {key} and in a section")
            else:
                place[name] = value
        return found

    def _value(self, value: Any, key: str, depth: int) -> Any:
        self._seen += 1
        if self._seen > _MOST_VALUES or depth > _DEEPEST:
            raise ValueError(
                f"{key}: more than {_MOST_VALUES:,} values or {_DEEPEST} levels: do aliases (*name) repeat?"
            )
        if isinstance(value, dict):
            return self.section(value, f"{key}.", depth)
        if isinstance(value, list):
            return [self._value(entry, key, depth + 1) for entry in value]
        if value is None or isinstance(value, str):
            return value
        raise ValueError(f"{key}: expected text, a list or a section, got a {type(value).__name__}")


def _apply(merged: DictConfig, text: str, is_scalar: Callable[[str], bool]) -> set[str]:
    """Merge one override; returns the dotted keys that it sets."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigTypeError, GrammarParseError

    key, equals, typed = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise ConfigError(f"{shortened(text)}: expected an override of the form key=value, for example lr=0.001")
    if typed.startswith("="):
        raise ConfigError(f"{key}: expected key=value, got two equals signs in {shown(text)}; quote a value like '=x'")
    value = _typed(key, typed, is_scalar(key))
    try:
        OmegaConf.update(merged, key, value, merge=True, force_add=True)
    except GrammarParseError as error:
        raise ConfigError(f"{key}: cannot be read: {str(error).splitlines()[0]}") from None
    except (ConfigTypeError, TypeError, ValueError, IndexError):
        raise ConfigError(f"{shortened(text)}: the value does not fit what {key} holds") from None
    return _leaves(key, value)


def _typed(key: str, typed: str, scalar: bool) -> Any:
    """What was typed after the equals sign: one word as it stands, everything else read as YAML."""
    if scalar:
        if typed in _NULLS:
            return None
        if not re.fullmatch(r"'.*'|\".*\"", typed, re.DOTALL):
            return typed
    try:
        value = yaml.load(typed, _TextLoader) if typed else ""
        return _Walk().section({"value": value})["value"]
    except yaml.YAMLError as error:
        if scalar:
            return typed
        raise ConfigError(f"{shortened(f'{key}={typed}')}: cannot be read: {_problem(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{key}: nested too deeply") from None


def _leaves(key: str, value: Any) -> set[str]:
    if isinstance(value, dict) and value:
        return set().union(*(_leaves(f"{key}.{name}", inner) for name, inner in value.items()))
    return {key}


def _problem(error: yaml.YAMLError) -> str:
    """One line, with the place in the file."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark, problem = error.problem_mark, error.problem or error.context or "cannot be read"
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"


def _key_of(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    return f"{key}: " if key else ""


def _quoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _quoted(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_quoted(entry) for entry in value]
    # A backslash before ${ keeps OmegaConf from reading it, and itself has to be doubled there.
    return _Quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", value)) if isinstance(value, str) else value
