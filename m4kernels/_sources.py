"""What the extension is built from, and a digest of it that is compiled in: so an old build is not taken for the new
one. Used by setup.py as well, which runs without torch; hence this imports nothing but the standard library."""

import hashlib
import os
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
BUILD_SCRIPT = "setup.py"


def files(root: Path) -> list[str]:
    """The sources under `<root>/csrc`, as paths relative to `root` with forward slashes, sorted.

    Hidden files are left out: editors keep locks and swap files there.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, _, names in os.walk(root / "csrc", onerror=refuse):
        inside = Path(folder).relative_to(root).as_posix()
        found += [f"{inside}/{name}" for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def digest(root: Path) -> str:
    """32 hexadecimal digits of the names and contents of the sources and of the build script.

    Neither times nor ends of lines count, which git changes. (About 2 ms for 50 files.)

    Raises:
        OSError: a file cannot be read.
    """
    total = hashlib.blake2b(digest_size=16)
    for name in (*files(root), BUILD_SCRIPT):
        content = (root / name).read_bytes().replace(b"\r\n", b"\n")
        total.update(f"{name}\n{len(content)}\n".encode(errors="surrogateescape"))
        total.update(content)
    return total.hexdigest()


def checkout() -> Path | None:
    """The repository that this package is imported from; None for an installed wheel: no sources lie beside it."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "csrc" / "bindings.cpp").is_file() and (root / BUILD_SCRIPT).is_file() else None
