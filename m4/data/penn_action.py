"""Read and write the Penn Action layout: ``frames/0001/000001.jpg`` and ``labels/0001.mat``.

Coordinates in labels are MATLAB pixels: the centre of the top-left pixel is (1, 1). The continuous pixel coordinates
used everywhere else put that centre at (0.5, 0.5), so ``continuous = matlab - 0.5``.

Source: Zhang, Zhu, Derpanis, "From Actemes to Action" (ICCV 2013), dataset Penn Action.
"""

from __future__ import annotations

import glob
import io
import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from scipy.io.matlab import MatReadError

from m4.data.frames import BAD_FILE as _BAD_FILE
from m4.data.frames import frame_names, natural_key, order_frames, read_frame, reading
from m4.errors import DataError, data_error
from m4.modalities import JOINTS, NUM_JOINTS

VIEWS = ("front", "back", "left", "right")

# Some label files state 271x481 for 270x480 footage; pixel positions are unaffected by such a margin.
SIZE_TOLERANCE = 2

_REQUIRED = ("x", "y", "visibility", "dimensions", "nframes", "action", "pose")
# Everything scipy.io.loadmat raises on a damaged file (found by cutting and flipping real label files).
_LOADMAT_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    MemoryError,
    OverflowError,
    NotImplementedError,
    UnboundLocalError,
    MatReadError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, eq=False)
class Label:
    """One annotated sequence of T frames.

    x, y: float64 (T, 13), MATLAB pixels. visible: bool (T, 13); a joint with a non-finite coordinate is invisible.
    bbox: float64 (T, 4) or None where the file's boxes do not match its frames (the pipeline does not use them).
    """

    x: np.ndarray
    y: np.ndarray
    visible: np.ndarray
    height: int
    width: int
    action: str
    view: str
    train: bool
    bbox: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.x)

    def continuous(self, frame: int) -> np.ndarray:
        """Joints of one frame (counted from 0), float64 (13, 2), continuous pixel coordinates."""
        return np.stack([self.x[frame], self.y[frame]], axis=-1) - 0.5


@dataclass(frozen=True)
class Video:
    """A sequence whose label has been read and whose frames exist, one file per labelled frame."""

    name: str
    label: Label
    frames: tuple[Path, ...]

    def image(self, frame: int) -> Image.Image:
        """Frame ``frame`` (counted from 0) as RGB. Raises DataError for a file that is no image of the label's size."""
        image = read_frame(self.frames[frame])
        width, height = image.size
        label = self.label
        if abs(width - label.width) > SIZE_TOLERANCE or abs(height - label.height) > SIZE_TOLERANCE:
            raise data_error(
                self.frames[frame],
                expected=f"{label.width}x{label.height} pixels (dimensions of labels/{self.name}.mat)",
                actual=f"{width}x{height}",
                remedy="The joints would not fit the picture: use the original frames, or correct the label.",
            )
        return image


def read_label(path: str | os.PathLike) -> Label:
    """Read and check one label file. Raises DataError naming the file, what was expected, and what to do."""
    path = Path(path)
    fields = _load_mat(path)
    missing = [key for key in _REQUIRED if key not in fields]
    if missing:
        raise data_error(
            path,
            expected=f"the fields {', '.join(_REQUIRED)}",
            actual=f"no {', '.join(missing)}",
            remedy=_BAD_FILE,
        )
    count = float(_numbers(path, fields, "nframes", shape=(1,))[0])
    if not count.is_integer() or count < 1:
        raise data_error(path, expected="a whole number of frames in nframes", actual=count, remedy=_BAD_FILE)
    frames = int(count)
    dimensions = _numbers(path, fields, "dimensions", shape=(3,))
    whole = np.isfinite(dimensions).all() and (dimensions == np.floor(dimensions)).all()
    if not whole or dimensions.min() < 1 or dimensions[2] != frames:
        raise data_error(
            path,
            expected=f"dimensions [height width {frames}] with positive sizes in whole pixels",
            actual=dimensions.tolist(),
            remedy=_BAD_FILE,
        )
    x = _numbers(path, fields, "x", shape=(frames, NUM_JOINTS))
    y = _numbers(path, fields, "y", shape=(frames, NUM_JOINTS))
    visibility = _numbers(path, fields, "visibility", shape=(frames, NUM_JOINTS))
    visible = (visibility > 0) & np.isfinite(x) & np.isfinite(y)
    bbox = np.asarray(fields["bbox"]) if "bbox" in fields else None
    if bbox is not None and (bbox.shape != (frames, 4) or bbox.dtype.kind not in "biuf"):
        bbox = None
    return Label(
        x=x,
        y=y,
        visible=visible,
        height=int(dimensions[0]),
        width=int(dimensions[1]),
        action=_text(path, fields, "action"),
        view=_text(path, fields, "pose"),
        train=_train(path, fields),
        bbox=None if bbox is None else bbox.astype(np.float64),
    )


def write_label(path: str | os.PathLike, label: Label) -> None:
    """Write ``label`` with the fields, shapes and dtypes of a Penn Action label file (byte-identical when repeated)."""
    frames = len(label)
    bbox = label.bbox if label.bbox is not None else np.zeros((frames, 4))
    fields = {
        "action": np.array([label.action]),
        "pose": np.array([label.view]),
        "x": label.x.astype(np.float64),
        "y": label.y.astype(np.float64),
        "visibility": label.visible.astype(np.uint8),
        "train": np.array([[1 if label.train else -1]], dtype=np.int32),
        "bbox": bbox.astype(np.float64),
        "dimensions": np.array([[label.height, label.width, frames]], dtype=np.uint16),
        "nframes": np.array([[frames]], dtype=np.uint16),
    }
    with open(path, "wb") as file:
        scipy.io.savemat(file, fields)
        # The header carries the time of writing; a fixed text makes equal labels equal files.
        file.seek(0)
        file.write(b"MATLAB 5.0 MAT-file, Penn Action layout".ljust(116))


def list_videos(root: str | os.PathLike) -> list[str]:
    """Names of all sequences that have a label file or a frames folder, sorted. Raises DataError for a wrong root."""
    root = Path(root)
    if not root.is_dir():
        raise data_error(
            root, expected="a folder in the Penn Action layout", actual="no such folder", remedy="Check the path."
        )
    for part in ("frames", "labels"):
        if not (root / part).is_dir():
            raise data_error(
                root / part,
                expected="the folders frames/ and labels/ of Penn Action",
                actual=f"no {part}/ in {root}",
                remedy="Point --penn-action at the unpacked dataset, or make one: python -m m4.data synth --out DIR.",
            )
    labels = {Path(name).stem for name in _entries(root / "labels") if Path(name).suffix.lower() == ".mat"}
    names = sorted(labels | _folders(root / "frames"), key=natural_key)
    if not names:
        raise data_error(
            root,
            expected="at least one labels/*.mat with its frames folder",
            actual="none",
            remedy="Point --penn-action at the unpacked dataset, or make one: python -m m4.data synth --out DIR.",
        )
    return names


def _entries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def _folders(base: Path) -> set[str]:
    """Everything in ``base`` but files: what is no folder after all, such as a link to nothing, is reported later."""
    return {name for name in _entries(base) if not os.path.isfile(base / name)}


def label_path(root: Path, name: str) -> Path:
    """The label file of sequence ``name``, ``labels/{name}.mat`` in whatever capitals the ending has."""
    path = root / "labels" / f"{name}.mat"
    if os.path.lexists(path):
        return path
    return next((entry for entry in path.parent.glob(f"{glob.escape(name)}.[mM][aA][tT]")), path)


def open_video(root: str | os.PathLike, name: str) -> Video:
    """Read the label of sequence ``name`` and find its frames.

    Raises DataError where a part is missing or cannot be read, and where the two disagree.
    """
    root = Path(root)
    label_file, folder = label_path(root, name), root / "frames" / name
    if not os.path.lexists(label_file):
        raise data_error(
            label_file, expected="a label file", actual="none", remedy=f"Add it, or remove {folder} to leave it out."
        )
    if not os.path.isdir(folder):
        found = "something else" if os.path.lexists(folder) else "none"
        raise data_error(folder, expected="a folder of frames", actual=found, remedy=f"Add it, or remove {label_file}.")
    label = read_label(label_file)
    names = frame_names(folder)
    if len(names) != len(label):
        raise data_error(
            folder,
            expected=f"{len(label)} frames (nframes of {label_file.name})",
            actual=f"{len(names)}",
            remedy="Unpack the frames again; joints cannot be matched to frames by number.",
        )
    return Video(name=name, label=label, frames=tuple(folder / frame for frame in order_frames(folder, names)))


def _load_mat(path: Path) -> dict:
    with reading(path, "a label file"):
        # Read whole, so that errors of the disk and of the format are told apart; a folder or a pipe is refused here.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise data_error(path, expected="a label file", actual="no plain file", remedy=_BAD_FILE)
        content = path.read_bytes()
    size = len(content)
    if content.startswith(b"MATLAB 7.3"):
        raise data_error(
            path,
            expected="a readable MATLAB 5 file",
            actual="one of version 7.3 (HDF5)",
            remedy="Save it with MATLAB's option -v7, or leave the video out.",
        )
    try:
        return scipy.io.loadmat(io.BytesIO(content))
    except _LOADMAT_ERRORS as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise data_error(
            path, expected="a readable MATLAB 5 file", actual=f"{size} bytes ({reason})", remedy=_BAD_FILE
        ) from error


def _numbers(path: Path, fields: dict, key: str, shape: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(fields[key])
    if value.dtype.kind not in "biuf":
        raise data_error(path, expected=f"numbers in {key}", actual=f"dtype {value.dtype}", remedy=_BAD_FILE)
    if len(shape) == 1:
        value = value.ravel()
    if value.shape != shape:
        wanted = f"{shape[0]} frames x {shape[1]} joints" if len(shape) == 2 else f"{shape[0]} values"
        raise data_error(path, expected=f"{key} with {wanted}", actual=f"shape {value.shape}", remedy=_BAD_FILE)
    return value.astype(np.float64)


def _train(path: Path, fields: dict) -> bool:
    """Which of Penn Action's halves: 1 for training, -1 for testing; training where the file does not say."""
    if "train" not in fields:
        return True
    value = float(_numbers(path, fields, "train", shape=(1,))[0])
    if value not in (1, 0, -1):
        raise data_error(path, expected="1 or -1 in train", actual=value, remedy=_BAD_FILE)
    return value == 1


def _text(path: Path, fields: dict, key: str) -> str:
    value = np.asarray(fields[key]).ravel()
    if value.dtype.kind not in "US" or len(value) == 0:
        found = f"dtype {value.dtype}" if len(value) else "nothing"
        raise data_error(path, expected=f"text in {key}", actual=found, remedy=_BAD_FILE)
    return str(value[0])


__all__ = [
    "JOINTS",
    "NUM_JOINTS",
    "VIEWS",
    "DataError",
    "Label",
    "Video",
    "list_videos",
    "open_video",
    "read_frame",
    "read_label",
    "write_label",
]
