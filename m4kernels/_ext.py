"""The only import of the compiled extension. Absent is not the same as broken: absent gives None and a reason, broken
raises what is wrong and what to do."""

import functools
import importlib
import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (first, so that the extension shares torch's OpenMP runtime)

from m4kernels import _sources
from m4kernels._version import __version__

AGAIN = "run `pip install -e .` again"


@functools.cache
def load() -> ModuleType | None:
    """The extension module, or None when it was never built.

    Raises:
        ImportError: the extension exists but does not load, or was built from other sources than those beside it.
    """
    if importlib.util.find_spec("m4kernels._C") is None:
        return None
    try:
        extension = importlib.import_module("m4kernels._C")
    except ImportError as error:
        raise ImportError(f"m4kernels._C does not load ({error}): {AGAIN}") from error
    why = _stale(extension)
    if why is not None:
        raise ImportError(f"m4kernels._C is an old build, {why}: {AGAIN}")
    return extension


def _stale(extension: ModuleType) -> str | None:
    """What shows that the extension was built from other sources; None when nothing does."""
    version = getattr(extension, "version", "unknown")
    if version != __version__:
        return f"built from version {version}, but the Python sources are {__version__}"
    root = _sources.checkout()
    if root is None:  # an installed wheel: the extension came with the Python files
        return None
    try:
        digest = _sources.digest(root)
    except OSError as error:
        raise ImportError(
            f"{error.filename} cannot be read ({error.strerror}), so nobody knows whether m4kernels._C was built from "
            f"it: make the sources readable, or {AGAIN}"
        ) from error
    if getattr(extension, "sources", None) != digest:  # builds of before the digest have none
        return f"not built from what csrc/ and setup.py in {root} hold now"
    return None


def absent() -> str:
    """The reason where `load` gives None."""
    others = sorted(path.name for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd"))
    why = f" for this Python, which wants _C{EXTENSION_SUFFIXES[0]}; there is {', '.join(others)}" if others else ""
    return f"the extension m4kernels._C is not built{why}: run `pip install -e .` in the repository"


def require() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: it is absent or broken.
    """
    extension = load()
    if extension is None:
        raise ImportError(absent())
    return extension
