"""Where figures land in a frame: perspective of animated bodies, points inferred from 2-D labels, and camera shake."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m4.data.penn_action import NUM_JOINTS, Label
from m4.data.synthetic.motions import FACE, L_HAND, L_TOES, NECK, NUM_POINTS, R_HAND, R_TOES
from m4.data.synthetic.scenes import MARGIN
from m4.modalities import NO_POSITION

# Bones and their length in body heights: the longest seen in a clip is the least foreshortened.
_BONES = ((1, 7, 0.28), (2, 8, 0.28), (7, 9, 0.235), (8, 10, 0.235), (9, 11, 0.235), (10, 12, 0.235), (1, 3, 0.165))


@dataclass(frozen=True, eq=False)
class Track:
    """A figure in image space. points (T, 19, 2) continuous pixels, depth (T, 19), known (T, 19), height_px (T,)."""

    points: np.ndarray
    depth: np.ndarray
    known: np.ndarray
    height_px: np.ndarray


def project(body: np.ndarray, size: tuple[int, int], fill: float, rng: np.random.Generator) -> Track:
    """Perspective view of ``body`` (T, 19, 3), sized so that the figure fills the share ``fill`` of the frame."""
    height, width = size
    distance, eye = rng.uniform(3.4, 5.0), rng.uniform(0.45, 0.85)
    nearness = distance / np.maximum(distance - body[..., 2], 0.8)
    u, v = body[..., 0] * nearness, (eye - body[..., 1]) * nearness
    span_v = v.max() - v.min() + 0.12
    span_u = (u.max(1) - u.min(1)).max() + 0.12
    scale = min(fill * height / span_v, fill * width / span_u)
    center_v = (v.max() + v.min()) / 2
    x = (u - u.mean()) * scale + width * rng.uniform(0.42, 0.58)
    y = (v - center_v) * scale + height * rng.uniform(0.5, 0.54)
    return Track(
        points=np.stack([x, y], -1),
        depth=body[..., 2],
        known=np.ones(body.shape[:2], dtype=bool),
        height_px=scale * nearness.mean(1),
    )


def track_from_label(label: Label) -> Track:
    """Figure points for a label's 2-D joints: hands, toes, neck and face are inferred, near and far sides guessed.

    An invisible joint stored at the origin has no position and is left out, with the limbs that meet there.
    """
    frames = len(label)
    joints = np.stack([label.x, label.y], -1) - 0.5
    placed = np.isfinite(joints).all(-1) & (label.visible | (joints > NO_POSITION).any(-1))
    joints = np.where(placed[..., None], joints, 0.0)
    points = np.zeros((frames, NUM_POINTS, 2))
    known = np.zeros((frames, NUM_POINTS), dtype=bool)
    depth = np.zeros((frames, NUM_POINTS))
    points[:, :NUM_JOINTS], known[:, :NUM_JOINTS] = joints, placed
    points[:, NECK] = (joints[:, 1] + joints[:, 2]) / 2
    known[:, NECK] = placed[:, 1] & placed[:, 2]
    unit = _body_height(joints, placed)
    facing = {"left": -1.0, "right": 1.0}.get(label.view, 0.0)
    for elbow, wrist, hand in ((3, 5, L_HAND), (4, 6, R_HAND)):
        points[:, hand] = joints[:, wrist] + 0.3 * (joints[:, wrist] - joints[:, elbow])
        known[:, hand] = placed[:, elbow] & placed[:, wrist]
    for knee, ankle, toes, outward in ((9, 11, L_TOES, 1.0), (10, 12, R_TOES, -1.0)):
        sign = facing or outward * (0.5 if label.view == "front" else -0.5)
        shin = joints[:, ankle] - joints[:, knee]
        down = shin / np.maximum(np.linalg.norm(shin, axis=-1, keepdims=True), 1e-6)
        ahead = np.stack([sign * np.abs(down[:, 1]), np.abs(down[:, 0]) + 0.3], -1)
        points[:, toes] = joints[:, ankle] + ahead * 0.08 * unit
        known[:, toes] = placed[:, knee] & placed[:, ankle]
    points[:, FACE] = joints[:, 0] + np.array([facing * 0.06 * unit, 0.0])
    known[:, FACE] = placed[:, 0]
    # The side that is seen more often is the nearer one.
    seen = label.visible.mean(0)
    left, right = seen[1::2].mean(), seen[2::2].mean()
    side = 0.08 if left >= right else -0.08
    depth[:, [1, 3, 5, 7, 9, 11, L_HAND, L_TOES]] = side
    depth[:, [2, 4, 6, 8, 10, 12, R_HAND, R_TOES]] = -side
    depth[:, FACE] = {"front": 0.06, "back": -0.06}.get(label.view, 0.0)
    return Track(points=points, depth=depth, known=known, height_px=np.full(frames, unit))


def shake(frames: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Whole-pixel camera offsets (T, 2) within the scene's margin: a "tripod", a "handheld" or a "pan"ning camera."""
    still = np.zeros((frames, 2))
    if kind == "handheld":
        steps = rng.normal(0, 0.35, (frames, 2))
        velocity = np.zeros(2)
        for frame in range(1, frames):
            velocity = 0.8 * velocity + steps[frame]
            still[frame] = still[frame - 1] * 0.985 + velocity
    elif kind == "pan":
        reach = rng.uniform(0.4, 0.9) * MARGIN * rng.choice([-1, 1])
        still[:, 0] = np.linspace(-reach, reach, frames)
    return np.clip(np.round(still), -MARGIN, MARGIN).astype(int)


def _body_height(joints: np.ndarray, placed: np.ndarray) -> float:
    """Pixels to one body height, from the longest views of each bone; 120 where no bone is ever seen."""
    estimates = []
    for a, b, length in _BONES:
        both = placed[:, a] & placed[:, b]
        if both.any():
            estimates.append(np.percentile(np.linalg.norm(joints[both, a] - joints[both, b], axis=-1), 90) / length)
    return float(np.median(estimates)) if estimates else 120.0
