"""How far predicted poses are from the true ones, in pixels of the canvas, and the poses that nobody had to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from m4.modalities import CANVAS
from m4kernels import dequantize_coords

PCK_SHARES = (0.05, 0.1, 0.2)  # of the diagonal of the true pose's bounding box


@dataclass(frozen=True)
class Poses:
    """Poses of N samples. xy: float64 (N, J, 2), pixels of the canvas; visible: bool (N, J)."""

    xy: np.ndarray
    visible: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, bins: int) -> Poses:
        """From integer tokens (N, 3·J), rows x, y, visibility."""
        xy, visible = dequantize_coords(torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)), bins=bins)
        return cls(xy.double().numpy(), visible.numpy())

    def __len__(self) -> int:
        return len(self.visible)

    def repeated(self, samples: int) -> Poses:
        """One pose for each of so many samples."""
        return Poses(np.repeat(self.xy, samples, axis=0), np.repeat(self.visible, samples, axis=0))


def pose_figures(predicted: Poses, reference: Poses, true: Poses) -> dict[str, Any]:
    """How well poses are predicted.

    Returns:
        error_px, the mean distance over the joints that are visible in both the reference and the true pose, and pck,
        the share of these joints (name of a share in PCK_SHARES → value) that lie within that share of the diagonal of
        the true pose's bounding box, which holds its visible joints; None where there is no such joint. joints, their
        number. visibility_accuracy, over all joints.
    """
    judged = reference.visible & true.visible
    distance = np.linalg.norm(predicted.xy - true.xy, axis=-1)  # (N, J)
    low, high = bounding_boxes(true)
    diagonal = np.linalg.norm(high - low, axis=-1)[:, None]
    count = int(judged.sum())
    return {
        "error_px": float(distance[judged].mean()) if count else None,
        "pck": {
            f"{share:g}": float((distance <= share * diagonal)[judged].mean()) if count else None
            for share in PCK_SHARES
        },
        "visibility_accuracy": float((predicted.visible == true.visible).mean()) if len(true) else None,
        "joints": count,
    }


def nearest_figures(drawn: Sequence[Poses], reference: Poses, true: Poses) -> dict[str, Any]:
    """How near the nearest of several drawn futures comes to the true pose.

    Args:
        drawn: one pose for every sample each, at least one.
    Returns:
        samples, how many were drawn; error_px as in `pose_figures`, of the drawn pose of each sample whose mean error
        over its judged joints is least (the first of equals).
    """
    judged = reference.visible & true.visible
    distances = np.stack([np.linalg.norm(poses.xy - true.xy, axis=-1) for poses in drawn])  # (K, N, J)
    best = np.where(judged, distances, 0).sum(-1).argmin(0)  # all have the same joints, so the sum decides as the mean
    nearest = distances[best, np.arange(len(true))]  # (N, J)
    return {"samples": len(drawn), "error_px": float(nearest[judged].mean()) if judged.any() else None}


def bounding_boxes(poses: Poses) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest x, y of the visible joints, float64 (N, 2) each; ∞ and −∞ of a pose without any."""
    seen = poses.visible[..., None]
    low = np.where(seen, poses.xy, np.inf).min(1)
    high = np.where(seen, poses.xy, -np.inf).max(1)
    return low, high


def median_pose(poses: Poses) -> Poses:
    """The pose (N = 1) that predicts best without a look: of each joint the median x and y where it is visible, and
    visible where it mostly is. A joint that never is lies in the middle of the canvas."""
    seen = np.where(poses.visible[..., None], poses.xy, np.nan)
    never = ~poses.visible.any(0)
    seen[:, never] = CANVAS / 2
    return Poses(np.nanmedian(seen, axis=0)[None], (2 * poses.visible.sum(0) > len(poses))[None])
