"""A clip: a figure, its clothes, a scene and a camera, ready to be rendered frame by frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from m4.data.penn_action import NUM_JOINTS, Label, read_label
from m4.data.synthetic.camera import Track, project, shake, track_from_label
from m4.data.synthetic.figure import Outfit, draw_figure, hidden_joints, random_outfit
from m4.data.synthetic.motions import MOTIONS, animate
from m4.data.synthetic.scenes import MARGIN, Scene, make_scene

# The commonest frame sizes of Penn Action (height, width), and some of its odd ones.
SIZES = ((270, 480), (360, 480), (270, 480), (320, 480), (271, 481), (480, 270), (353, 481))
_YAW = {"front": 0.0, "back": 180.0, "left": -90.0, "right": 90.0}
_CAMERAS = ("tripod", "handheld", "pan")
_NOISE_SLACK = 64


@dataclass(frozen=True)
class SynthOptions:
    """What to draw. frames: (fewest, most) per video; None for 24 … 60, or with poses all that a label has.

    size: (height, width) of every frame, or None for a mixture of Penn Action's sizes. scenes: number of different
    backgrounds shared by the videos. people: number of different outfits they share, or None for one a video. steady:
    tripod cameras only. fps: frames a second of the motion. noise: standard deviation of the sensor noise, grey levels.
    """

    videos: int
    seed: int = 0
    frames: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    scenes: int = 48
    people: int | None = None
    steady: bool = False
    fps: float = 20.0
    noise: float = 2.0


@dataclass(frozen=True, eq=False)
class Clip:
    """``label`` is what the rendered frames show: its joints are the very points that the figure is drawn through."""

    label: Label
    track: Track
    scene: Scene
    offsets: np.ndarray
    outfit: Outfit
    prop: str | None
    noise: float
    noise_corners: np.ndarray

    def render(self, frame: int) -> Image.Image:
        """Frame ``frame`` (counted from 0), RGB."""
        label, track, scene = self.label, self.track, self.scene
        left, top = (int(value) + MARGIN for value in self.offsets[frame])
        window = (left, top, left + label.width, top + label.height)
        image = scene.canvas.crop(window)
        draw_figure(
            image,
            track.points[frame],
            track.depth[frame],
            track.known[frame],
            float(track.height_px[frame]),
            self.outfit,
            self.prop,
        )
        if scene.front is not None and scene.front_mask is not None:
            image.paste(scene.front.crop(window), (0, 0), scene.front_mask.crop(window))
        x, y = (int(value) for value in self.noise_corners[frame])
        tile = _noise_tile(label.height, label.width, self.noise).crop((x, y, x + label.width, y + label.height))
        return ImageChops.add(image, tile, offset=-128)


def animated_clip(options: SynthOptions, index: int) -> Clip:
    """Video ``index`` of an animated data set."""
    rng = np.random.default_rng([options.seed, 2, index])
    size = options.size or SIZES[int(rng.integers(len(SIZES)))]
    fewest, most = options.frames or (24, 60)
    frames = int(rng.integers(fewest, most + 1))
    action = list(MOTIONS)[int(rng.integers(len(MOTIONS)))]
    motion = MOTIONS[action]
    view = motion.views[int(rng.integers(len(motion.views)))]
    yaw = _YAW[view] + rng.uniform(-25, 25)
    body = animate(motion, np.arange(frames) / options.fps, yaw, rng)
    # One figure in eight is too large for its frame, so that some joints leave it.
    fill = rng.uniform(1.05, 1.3) if rng.uniform() < 0.125 else rng.uniform(0.72, 0.95)
    track = project(body, size, fill, rng)
    scene = _scene(options.seed, int(rng.integers(options.scenes)), size)
    offsets = shake(frames, "tripod" if options.steady else str(rng.choice(_CAMERAS, p=(0.4, 0.35, 0.25))), rng)
    track = replace(track, points=track.points - offsets[:, None])
    joints = track.points[:, :NUM_JOINTS]
    inside = ((joints >= 0) & (joints <= (size[1], size[0]))).all(-1)
    visible = (
        inside
        & ~hidden_joints(track.points, track.depth, track.height_px)
        & ~_covered(scene, joints + offsets[:, None])
    )
    label = Label(
        x=joints[..., 0] + 0.5,
        y=joints[..., 1] + 0.5,
        visible=visible,
        height=size[0],
        width=size[1],
        action=action,
        view=view,
        train=bool(rng.uniform() < 0.5),
        bbox=_boxes(joints, size),
    )
    return _dressed(options, label, track, scene, offsets, motion.prop, rng)


def reenacted_clip(options: SynthOptions, index: int, source: Path) -> Clip:
    """The label file ``source`` over a scene: same size, joints and visibility. ``options.frames`` may cut it short."""
    rng = np.random.default_rng([options.seed, 3, index])
    label = reenacted_label(options, source)
    scene = _scene(options.seed, int(rng.integers(options.scenes)), (label.height, label.width))
    # What hides a joint in the original is unknown, so nothing is put before the figure.
    scene = Scene(scene.canvas)
    offsets = shake(len(label), "tripod" if options.steady else "handheld", rng)
    prop = MOTIONS[label.action].prop if label.action in MOTIONS else None
    return _dressed(options, label, track_from_label(label), scene, offsets, prop, rng)


def reenacted_label(options: SynthOptions, source: Path) -> Label:
    """The label file ``source``, cut to ``options.frames``."""
    label = read_label(source)
    frames = len(label) if options.frames is None else min(len(label), options.frames[1])
    return replace(
        label,
        x=label.x[:frames],
        y=label.y[:frames],
        visible=label.visible[:frames],
        bbox=None if label.bbox is None else label.bbox[:frames],
    )


def _dressed(options, label: Label, track: Track, scene: Scene, offsets: np.ndarray, prop: str | None, rng) -> Clip:
    if options.people is not None:
        person = int(rng.integers(options.people))
        outfit = random_outfit(np.random.default_rng([options.seed, 6, person]))
    else:
        outfit = random_outfit(rng)
    corners = rng.integers(0, _NOISE_SLACK, (len(label), 2))
    return Clip(label, track, scene, offsets, outfit, prop, options.noise, corners)


@lru_cache(maxsize=64)
def _scene(seed: int, number: int, size: tuple[int, int]) -> Scene:
    return make_scene(size, np.random.default_rng([seed, 4, number]))


@lru_cache(maxsize=32)
def _noise_tile(height: int, width: int, level: float) -> Image.Image:
    """Sensor noise around 128, RGB, with slack to be cropped at random corners."""
    rng = np.random.default_rng(5)
    shape = (height + _NOISE_SLACK, width + _NOISE_SLACK)
    noise = rng.normal(0, level, (*shape, 1)) + rng.normal(0, level / 2, (*shape, 3))
    return Image.fromarray(np.clip(np.round(128 + noise), 0, 255).astype(np.uint8))


def _covered(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Whether points (T, J, 2), pixels of the frame when the camera rests, lie behind the scene's foreground."""
    if scene.front_mask is None:
        return np.zeros(points.shape[:2], dtype=bool)
    mask = np.asarray(scene.front_mask)
    x, y = (np.floor(points[..., axis]).astype(int) + MARGIN for axis in (0, 1))
    inside = (x >= 0) & (x < mask.shape[1]) & (y >= 0) & (y < mask.shape[0])
    return inside & (mask[np.clip(y, 0, mask.shape[0] - 1), np.clip(x, 0, mask.shape[1] - 1)] > 127)


def _boxes(joints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Penn Action's bbox, MATLAB pixels (T, 4): left, top, right, bottom of the figure, inside the frame."""
    low = np.clip(joints.min(1), 0, (size[1], size[0])) + 0.5
    high = np.clip(joints.max(1), 0, (size[1], size[0])) + 0.5
    return np.concatenate([low, high], axis=1)
