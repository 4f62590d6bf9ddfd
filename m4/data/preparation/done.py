"""Which videos are done: their tokens are there, and were made of the files that are there now.

Of each video the output keeps ``{video}.npz``, which holds the digest of the content it was made of (so that equal
input gives equal bytes), ``{video}.status``, which remembers the status of the files of that content (so that they need
not be read again), or ``{video}.bad``, the reason why it cannot be used.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from m4.data.frames import reading
from m4.data.penn_action import Video, label_path, open_video
from m4.data.preparation.assemble import load_video, work_path
from m4.data.stamps import FileStamp
from m4.errors import DataError
from m4.files import write_atomically


def status_of(source: Path, video: Video) -> FileStamp:
    """The status of a video's label and frames. Raises DataError for one that is gone."""
    stamp = FileStamp()
    for number, path in enumerate((label_path(source, video.name), *video.frames)):
        with reading(path, "a file that can be read"):
            stamp.add(f"{number}:{path.name}", os.stat(path))
    return stamp


def content_of(source: Path, video: Video) -> str:
    """SHA-256 over a video's label and frames. Raises DataError for one that cannot be read."""
    digest = hashlib.sha256()
    for path in (label_path(source, video.name), *video.frames):
        with reading(path, "a file that can be read"):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def made_of(done: Path, name: str) -> str | None:
    """The digest of the content that a video's tokens were made of; None without (whole) tokens, "" if unknown."""
    try:
        arrays = load_video(work_path(done, name, ".npz"))
    except (FileNotFoundError, DataError):
        return None
    return str(arrays["content"]) if "content" in arrays else ""


def remember(done: Path, name: str, status: FileStamp, content: str) -> None:
    """That files of this status have this content."""
    write_atomically(work_path(done, name, ".status"), f"{status.hexdigest()} {content}\n".encode())


def is_done(source: Path, done: Path, name: str) -> bool:
    """Whether a video need not be looked at again; False where its files must be read to tell."""
    content = made_of(done, name)
    if content is None:
        return False
    # A source that is gone is no changed source: frames may be deleted once their tokens are made.
    if not os.path.lexists(source / "frames" / name):
        return True
    try:
        kept = work_path(done, name, ".status").read_text()
        return kept == f"{status_of(source, open_video(source, name)).hexdigest()} {content}\n"
    except (FileNotFoundError, UnicodeDecodeError, DataError):
        return False
