"""What was generated, as a picture, an animation, arrays or figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from m4.data.store import TokenStore
from m4.generation.horizons import HorizonErrors, TrueMoments
from m4.generation.inputs import Inputs, row_tensor
from m4.generation.moments import MOMENTS, Painter, shifted
from m4.modalities import NEXT, REFERENCE, TABLE
from m4.pictures.sheets import Moment, moment_sheet


class Result(Protocol):
    """What the files are made of."""

    def picture(self) -> Image.Image:
        """One picture of all."""

    def frames(self) -> Iterator[Image.Image]:
        """The pictures of an animation, all of one size."""

    def arrays(self) -> dict[str, np.ndarray]:
        """For a .npz file."""

    def figures(self) -> dict[str, Any]:
        """For a .json file, and the table that is printed."""


def token_arrays(painter: Painter, rows: np.ndarray, names: Sequence[str], prefix: str = "") -> dict[str, np.ndarray]:
    """name → tokens (…, *shape) of rows (…, L); of joints besides name_xy (…, 13, 2), pixels, and name_visible."""
    found = {}
    for name in names:
        modality = painter.layout[name]
        tokens = rows[..., painter.layout.span(name)]
        found[prefix + name] = tokens.reshape(*rows.shape[:-1], *modality.shape)
        if modality == TABLE.get(name) and modality.kind == "joints":
            xy, visible = painter.poses(row_tensor(rows.reshape(-1, rows.shape[-1])), name)
            found[f"{prefix}{name}_xy"] = xy.reshape(*rows.shape[:-1], *xy.shape[1:])
            found[f"{prefix}{name}_visible"] = visible.reshape(*rows.shape[:-1], *visible.shape[1:])
    return found


@dataclass(frozen=True)
class Filled:
    """Modalities that were filled in.

    predicted: uint16 (N, L) rows.
    """

    painter: Painter
    inputs: Inputs
    given: Sequence[str]
    wanted: Sequence[str]
    predicted: np.ndarray

    def picture(self) -> Image.Image:
        columns = []
        titles = []
        used = {*self.given, *self.wanted}
        for title, names in MOMENTS.items():
            shown = [name for name in names if name in used]
            if not shown:
                continue
            if not set(shown) & set(self.wanted):
                titles.append(title)
                columns.append(self.painter.moments(self.inputs.batch(), shown))
                continue
            if self.inputs.rows is not None:
                titles.append(f"true {title}")
                columns.append(self.painter.moments(self.inputs.batch(), shown))
            titles.append(f"predicted {title}")
            columns.append(self.painter.moments(row_tensor(self.predicted), shown))
        return moment_sheet(list(zip(*columns, strict=True)), titles)

    def frames(self) -> Iterator[Image.Image]:
        sources = {"predicted": row_tensor(self.predicted)}
        if self.inputs.rows is not None:
            sources["true"] = self.inputs.batch()
        for names in MOMENTS.values():
            shown = [name for name in names if name in {*self.given, *self.wanted}]
            if shown:
                columns = [self.painter.moments(rows, shown) for rows in sources.values()]
                yield moment_sheet(list(zip(*columns, strict=True)), list(sources))

    def arrays(self) -> dict[str, np.ndarray]:
        found = token_arrays(self.painter, self.predicted, [*self.given, *self.wanted])
        if self.inputs.rows is not None:
            found |= token_arrays(self.painter, self.inputs.tokens, self.wanted, "true_")
        return found

    def figures(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class RolledOut:
    """A motion that was rolled out.

    predicted: uint16 (H, N, L) rows, each moment's. true, errors: where prepared samples were rolled out whose poses
    are known, as is `store`, in which they lie.
    """

    painter: Painter
    inputs: Inputs
    given: Sequence[str]
    wanted: Sequence[str]
    predicted: np.ndarray
    store: TokenStore | None = None
    true: TrueMoments | None = None
    errors: HorizonErrors | None = None

    def picture(self) -> Image.Image:
        """Two rows a sample, what was true and what was predicted; a column a moment."""
        titles = ["reference", *(f"moment {moment}" for moment in range(1, len(self.predicted) + 1))]
        columns = [self._reference(), *(self._moments(moment) for moment in range(len(self.predicted)))]
        rows = []
        for sample in range(len(self.inputs.names)):
            for source in range(len(columns[0])):
                rows.append([column[source][sample] for column in columns])
        return moment_sheet(rows, titles)

    def frames(self) -> Iterator[Image.Image]:
        """A row a sample; what was predicted beside what was true."""
        titles = ["predicted", "true"] if self.true is not None else ["predicted"]
        for moment in range(-1, len(self.predicted)):
            sources = self._reference() if moment < 0 else self._moments(moment)
            yield moment_sheet(list(zip(*reversed(sources), strict=True)), titles)

    def arrays(self) -> dict[str, np.ndarray]:
        rows = np.swapaxes(self.predicted, 0, 1)  # sample by sample
        found = token_arrays(self.painter, self.inputs.tokens, self.given)
        found |= token_arrays(self.painter, rows, self.wanted)
        if self.true is not None and self.errors is not None and self.store is not None:
            poses = [self._true_poses(moment) for moment in range(len(self.predicted))]
            found["true_coords_next_xy"] = np.stack([xy for xy, _ in poses], axis=1).astype(np.float32)
            found["true_coords_next_visible"] = np.stack([visible for _, visible in poses], axis=1)
            found |= {"error_px": self.errors.error_px, "copy_px": self.errors.copy_px, "joints": self.errors.joints}
            found["error_px_of_sample"] = self.errors.of_sample
        return found

    def figures(self) -> dict[str, Any]:
        return {} if self.errors is None else self.errors.figures()

    def _reference(self) -> list[list[Moment]]:
        """(true, predicted) moments of the samples, or (predicted,) alone; of the reference both are what is given."""
        captions = list(self.inputs.names)
        moments = self.painter.moments(self.inputs.batch(), [name for name in REFERENCE if name in self.given])
        predicted = [
            replace(moment, caption=f"{name}: predicted") for moment, name in zip(moments, captions, strict=True)
        ]
        if self.true is None:
            return [predicted]
        return [
            [replace(moment, caption=f"{name}: true") for moment, name in zip(moments, captions, strict=True)],
            predicted,
        ]

    def _moments(self, moment: int) -> list[list[Moment]]:
        rows = row_tensor(self.predicted[moment])
        predicted = self.painter.moments(rows, self.wanted, self._captions(moment))
        return [predicted] if self.true is None else [self._true_moments(moment), predicted]

    def _captions(self, moment: int) -> list[str]:
        if self.errors is None:
            return []
        errors = self.errors.of_sample[:, moment].tolist()
        return ["" if np.isnan(error) else f"{error:.1f} px off" for error in errors]

    def _true_moments(self, moment: int) -> list[Moment]:
        """In the window of the sample that was rolled out."""
        assert self.true is not None
        assert self.store is not None
        rows, shift = self.true.rows[:, moment], self.true.shift[:, moment]
        there = rows >= 0
        found = [Moment(caption="no true motion")] * len(rows)
        drawn = self.painter.moments(self.store.batch(rows[there]), [name for name in NEXT if name in self.wanted])
        xy, visible = self._true_poses(moment)
        for sample, shown in zip(np.flatnonzero(there).tolist(), drawn, strict=True):
            image = None if shown.image is None else shifted(shown.image, shift[sample])
            found[sample] = Moment(image, xy[sample], visible[sample])
        return found

    def _true_poses(self, moment: int) -> tuple[np.ndarray, np.ndarray]:
        """xy float64 (N, 13, 2), visible bool (N, 13); nothing is visible of a sample without truth."""
        assert self.true is not None
        assert self.store is not None
        there = self.true.rows[:, moment] >= 0
        poses = self.true.poses(self.store, moment, self.painter.layout, self.painter.meta)
        joints = poses.visible.shape[1]
        xy, visible = np.full((len(there), joints, 2), np.nan), np.zeros((len(there), joints), bool)
        xy[there], visible[there] = poses.xy, poses.visible
        return xy, visible
