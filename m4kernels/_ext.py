"""The only import of the compiled extension. Absent is not the same as broken: absent gives None and a reason, broken
re-raises what went wrong."""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch  # noqa: F401  (first, so that the extension shares torch's OpenMP runtime)

from m4kernels._version import __version__

ABSENT = "the extension m4kernels._C is not built: run `pip install -e .` in the repository"


@functools.cache
def load() -> ModuleType | None:
    """The extension module, or None when it was never built.

    Raises:
        ImportError: the extension exists but does not load, or was built from another version of the sources.
    """
    if importlib.util.find_spec("m4kernels._C") is None:
        return None
    extension = importlib.import_module("m4kernels._C")
    if extension.version != __version__:
        raise ImportError(
            f"m4kernels._C was built from version {extension.version}, but the Python sources are {__version__}: "
            "run `pip install -e .` again"
        )
    return extension


def require() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: it is absent or broken.
    """
    extension = load()
    if extension is None:
        raise ImportError(ABSENT)
    return extension
