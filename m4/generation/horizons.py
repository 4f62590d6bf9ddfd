"""How far a rolled-out motion is from the true one, moment by moment, beside poses that stand still.

The samples of a video follow each other, each cut from its frames by a window of its own. The window of one is told
from that of the sample before by the joints of the moment that both hold; truth is moved into the window of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m4.data.store import TokenStore
from m4.modalities import CANVAS, NEXT, REFERENCE, RowLayout, data_vocab_size
from m4.poses import Poses

_FIXED = ("center", "squash")  # framings whose window is the same for all frames of a video


@dataclass(frozen=True)
class TrueMoments:
    """What truly followed N samples, at H moments.

    rows: int64 (N, H), the sample whose next moment it is, -1 where there is no truth. shift: float64 (N, H, 2), what
    takes pixels of that sample's canvas to the first sample's, in x and y.
    """

    rows: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(
        cls,
        store: TokenStore,
        rows: np.ndarray,
        following: np.ndarray,
        moments: int,
        layout: RowLayout,
        meta: Mapping[str, Any],
    ) -> TrueMoments:
        """Of the samples ``rows``, int64 (N,); following: see `m4.data.following.following_rows`."""
        fixed = meta.get("options", {}).get("framing") in _FIXED
        found = np.full((len(rows), moments), -1, dtype=np.int64)
        shift = np.zeros((len(rows), moments, 2))
        for sample, row in enumerate(rows.tolist()):
            moved = np.zeros(2)
            for moment in range(moments):
                found[sample, moment], shift[sample, moment] = row, moved
                after = int(following[row])
                step = np.zeros(2) if fixed or after < 0 else _moved(store, row, after, layout, meta)
                if after < 0 or step is None:
                    break
                row, moved = after, moved + step
        return cls(found, shift)

    def poses(self, store: TokenStore, moment: int, layout: RowLayout, meta: Mapping[str, Any]) -> Poses:
        """The true poses of the samples that have one at this moment (from 0), on the canvas of the first."""
        there = self.rows[:, moment] >= 0
        poses = _poses(store, self.rows[there, moment], NEXT[1], layout, meta)
        xy = poses.xy + self.shift[there, moment, None]
        inside = ((xy >= 0) & (xy <= CANVAS)).all(-1)
        return Poses(xy, poses.visible & inside)


def _poses(store: TokenStore, rows: np.ndarray, name: str, layout: RowLayout, meta: Mapping[str, Any]) -> Poses:
    tokens = store.tokens[rows][:, layout.span(name)]
    return Poses.of(np.asarray(tokens), data_vocab_size(name, meta))


def _moved(store: TokenStore, row: int, after: int, layout: RowLayout, meta: Mapping[str, Any]) -> np.ndarray | None:
    """What takes the canvas of the sample ``after`` to that of ``row``; None where no joint is visible in both."""
    here = _poses(store, np.array([row]), NEXT[1], layout, meta)
    there = _poses(store, np.array([after]), REFERENCE[1], layout, meta)
    both = here.visible & there.visible
    return np.median((here.xy - there.xy)[both], axis=0) if both.any() else None


@dataclass(frozen=True)
class HorizonErrors:
    """Mean distances in pixels; NaN where no joint is judged.

    error_px, copy_px: float64 (H,), of the predicted pose and of the reference pose, over the joints that are visible
    in both the reference and the true pose. joints: int64 (H,). of_sample: float64 (N, H), error_px of each sample.
    """

    error_px: np.ndarray
    copy_px: np.ndarray
    joints: np.ndarray
    of_sample: np.ndarray

    def lines(self) -> list[str]:
        """A table, down to the last moment that has truth."""
        shown = int((self.joints > 0).sum())
        if not shown:
            return ["no true motion to compare with"]
        head = f"{'moment':>8}{'error px':>10}{'copying px':>12}{'joints':>8}"
        figures = zip(self.error_px, self.copy_px, self.joints, strict=True)
        body = [f"{n:>8}{e:>10.2f}{c:>12.2f}{j:>8}" for n, (e, c, j) in enumerate(figures, start=1) if j]
        return ["next pose, mean distance by moment", head, *body]

    def figures(self) -> dict[str, list]:
        """For JSON: None in place of NaN."""
        pairs = (("error_px", self.error_px), ("copy_px", self.copy_px))
        numbers = {name: [None if np.isnan(v) else float(v) for v in values] for name, values in pairs}
        return {**numbers, "joints": self.joints.tolist()}


def horizon_errors(
    predicted: np.ndarray,
    true: TrueMoments,
    store: TokenStore,
    rows: np.ndarray,
    layout: RowLayout,
    meta: Mapping[str, Any],
) -> HorizonErrors:
    """predicted: integer tokens (H, N, 3·J) of the poses; rows: int64 (N,), the samples they begin at."""
    moments, samples = predicted.shape[:2]
    reference = _poses(store, rows, REFERENCE[1], layout, meta)
    of_sample = np.full((samples, moments), np.nan)
    error, copied = np.full(moments, np.nan), np.full(moments, np.nan)
    joints = np.zeros(moments, dtype=np.int64)
    for moment in range(moments):
        there = true.rows[:, moment] >= 0
        truth = true.poses(store, moment, layout, meta)
        found = Poses.of(predicted[moment][there], data_vocab_size(NEXT[1], meta))
        judged = reference.visible[there] & truth.visible
        joints[moment] = judged.sum()
        if not joints[moment]:
            continue
        distance = np.linalg.norm(found.xy - truth.xy, axis=-1)
        error[moment] = distance[judged].mean()
        copied[moment] = np.linalg.norm(reference.xy[there] - truth.xy, axis=-1)[judged].mean()
        counts = judged.sum(-1)
        sums = np.where(judged, distance, 0).sum(-1)
        of_sample[there, moment] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return HorizonErrors(error, copied, joints, of_sample)
