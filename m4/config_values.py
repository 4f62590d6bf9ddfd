"""How the values of a configuration are read: by the type of their key, the same from a file, a command line or a dict.

* Text is what was typed. It is never empty, and never ``???``, OmegaConf's mark for what is still to be filled in.
* Numbers are plain decimals: ``8``, ``-3``, ``0.5``, ``.5``, ``1e-7``. What YAML 1.1 or Python would bend (``010``,
  ``0x10``, ``1_000``, ``1:30``) is refused, and so is what is not finite.
* ``true``, ``yes``, ``on`` and ``1`` are one truth, ``false``, ``no``, ``off`` and ``0`` the other.
* ``null`` is no value, for keys that may be without one.
"""

from __future__ import annotations

import math
import os
import re
import types
from collections.abc import Callable
from typing import Any, NewType, Union, get_args, get_origin

from m4.errors import ConfigError

Duration = NewType("Duration", str)  # H:MM:SS
Patterns = NewType("Patterns", dict[str, Any])  # attention patterns by name: a text, or rows of 0 and 1

_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DURATION = re.compile(r"([0-9]{1,7}):([0-5]?[0-9]):([0-5]?[0-9])")
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_PLAIN = "write numbers as finite plain decimals such as 8, 0.5 or 1e-7 (no leading zeros, 0x, _ or :)"
_SHOWN = 240  # characters of a value in a message


class _Unfit(Exception):
    """The value is not of the kind; the text, if any, says more than that."""


def read_value(kind: Any, value: Any) -> Any:
    """``value`` (text, or what Python or JSON has made of it) as the type of its key says.

    Args:
        kind: int, float, str, bool, `Duration`, `Patterns`, a list of one of them; or any of these, or None.
    Raises:
        ValueError: ``expected …, got …``, without the key.
    """
    plain, optional = _without_none(kind)
    if value is None and optional:
        return None
    try:
        if value is None:
            raise _Unfit("put it in quotes if it is text" if plain is str else "")
        if value == "???":
            raise _Unfit("??? stands for a value that is still to be given")
        return _read_list(get_args(plain)[0], value) if get_origin(plain) is list else _READERS[plain](value)
    except _Unfit as unfit:
        more = f"; {unfit}" if str(unfit) else ""
        raise ValueError(f"expected {describe(kind)}, got {shown(value)}{more}") from None


def describe(kind: Any) -> str:
    """What a key of this type holds, in words."""
    plain, optional = _without_none(kind)
    if get_origin(plain) is list:
        words = f"a list of {_PLURALS[get_args(plain)[0]]}"
    else:
        words = _WORDS[plain]
    return words + (" or null" if optional else "")


def is_scalar(kind: Any) -> bool:
    """Whether values of this type are written as one word, not as a list or a section."""
    plain, _ = _without_none(kind)
    return get_origin(plain) is not list and plain is not Patterns


def shown(value: Any) -> str:
    """A value in a message: one line, not too long, with words as they were typed inside a list."""
    return shortened(repr(value) if isinstance(value, str) else _bare(value))


def shortened(text: str) -> str:
    """A text in a message, as `shown` but without quotes."""
    text = _bare(text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]} … ({len(text)} characters)"


def parse_duration(value: Any) -> int:
    """Seconds of ``'14:34:45'`` or of a number of seconds.

    Raises:
        ConfigError: it is neither, or less than a second.
    """
    try:
        return _seconds(value)
    except _Unfit:
        raise ConfigError(f"training_time: expected {_WORDS[Duration]}, got {shown(value)}") from None


def format_duration(seconds: float) -> str:
    """``H:MM:SS``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _without_none(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    (plain,) = (part for part in get_args(kind) if part is not type(None))
    return plain, True


def _integer(value: Any) -> int:
    if isinstance(value, str):
        text = value.strip()
        if not _INTEGER.fullmatch(text):
            raise _Unfit(_PLAIN if re.search(r"[0-9]", text) else "")
        if len(text) > 20:
            raise _Unfit("it has more than 64 bits")
        value = int(text)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Unfit
    if not -(2**63) <= value < 2**63:
        raise _Unfit("it has more than 64 bits")
    return value


def _number(value: Any) -> float:
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise _Unfit(_PLAIN if re.search(r"[0-9]|inf|nan", value, re.IGNORECASE) else "")
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Unfit
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Unfit("it must be finite")
    return number + 0.0  # −0 is 0


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise _Unfit
    if "\0" in value:
        raise _Unfit("it holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Unfit("it is not valid Unicode (UTF-8)") from None
    return value


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.strip().lower() not in _FLAGS:
        raise _Unfit
    return _FLAGS[value.strip().lower()]


def _seconds(value: Any) -> int:
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        hours, minutes, seconds = (int(part) for part in match.groups())
        total = hours * 3600 + minutes * 60 + seconds
    else:
        number = _number(value)
        total = round(number) if abs(number) < 3.6e10 else -1  # as many hours as _DURATION reads
    if total < 1:
        raise _Unfit
    return total


def _duration(value: Any) -> str:
    return format_duration(_seconds(value))


def _patterns(value: Any) -> dict[str, Any]:
    """Which names and patterns there are is `m4.model.config.AttentionConfig`'s to say."""
    if not isinstance(value, dict):
        raise _Unfit
    return {name: _pattern(pattern) for name, pattern in value.items()}


def _pattern(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_pattern(row) if isinstance(row, (list, tuple)) else _integer(row) for row in value]
    return value


def _read_list(kind: Any, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _Unfit("write a list as [a, b]" if isinstance(value, str) else "")
    return [_READERS[kind](_not_empty(entry)) for entry in value]


def _not_empty(entry: Any) -> Any:
    if entry is None or entry in ("", "???"):
        raise _Unfit("each entry needs a value")
    return entry


def _bare(value: Any) -> str:
    """As `shown`, without the quotes around text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_bare, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_bare(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)[1:-1]
    return repr(value)


_READERS: dict[Any, Callable[[Any], Any]] = {
    int: _integer,
    float: _number,
    str: _text,
    bool: _flag,
    Duration: _duration,
    Patterns: _patterns,
}
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Duration: "hours:minutes:seconds or a number of seconds",
    Patterns: "a section of encoder, decoder and cross",
}
_PLURALS: dict[Any, str] = {int: "integers", float: "numbers", str: "names"}
