"""Draws a clothed human figure over a frame from projected points, and says which of its joints it hides itself."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from m4.data.penn_action import NUM_JOINTS
from m4.data.synthetic.motions import FACE, L_HAND, L_TOES, NECK, R_HAND, R_TOES
from m4.data.synthetic.scenes import Color, shade

_SUPERSAMPLE = 2

# (from, to, radius there, radius here, cloth, drawing bias towards the camera); radii in body heights.
_LIMBS = (
    (11, L_TOES, 0.026, 0.020, "shoes", -0.02),
    (12, R_TOES, 0.026, 0.020, "shoes", -0.02),
    (9, 11, 0.035, 0.023, "shins", -0.02),
    (10, 12, 0.035, 0.023, "shins", -0.02),
    (7, 9, 0.049, 0.036, "trousers", -0.02),
    (8, 10, 0.049, 0.036, "trousers", -0.02),
    (5, L_HAND, 0.019, 0.021, "skin", 0.04),
    (6, R_HAND, 0.019, 0.021, "skin", 0.04),
    (3, 5, 0.026, 0.019, "forearms", 0.04),
    (4, 6, 0.026, 0.019, "forearms", 0.04),
    (1, 3, 0.034, 0.027, "shirt", 0.03),
    (2, 4, 0.034, 0.027, "shirt", 0.03),
)
_TRUNK_RADIUS, _NECK_RADIUS, _HEAD_RADIUS = 0.060, 0.026, 0.058
_PROP_COLORS = {
    "bat": (196, 156, 96),
    "club": (70, 70, 76),
    "racket": (205, 60, 60),
    "barbell": (52, 54, 60),
    "bench": (58, 46, 44),
    "bar": (120, 122, 128),
    "guitar": (168, 92, 36),
    "rope": (238, 232, 214),
    "ball": (226, 110, 40),
}


@dataclass(frozen=True)
class Outfit:
    """RGB colours of a figure's parts."""

    skin: Color
    hair: Color
    shirt: Color
    trousers: Color
    shoes: Color
    long_sleeves: bool
    shorts: bool

    def color(self, part: str) -> Color:
        if part == "shins":
            return self.skin if self.shorts else self.trousers
        if part == "forearms":
            return self.shirt if self.long_sleeves else self.skin
        return getattr(self, part)


def random_outfit(rng: np.random.Generator) -> Outfit:
    """Clothes and complexion drawn from natural ranges."""

    def cloth(saturation: tuple[float, float], value: tuple[float, float]) -> Color:
        return _rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))

    tone = rng.uniform()
    return Outfit(
        skin=_rgb(0.065 + 0.02 * tone, 0.38 + 0.2 * tone, 0.92 - 0.5 * tone),
        hair=_rgb(0.08, rng.uniform(0.2, 0.6), rng.uniform(0.08, 0.45)),
        shirt=cloth((0.05, 0.85), (0.3, 0.97)),
        trousers=cloth((0.1, 0.5), (0.12, 0.55)),
        shoes=cloth((0.0, 0.4), (0.15, 0.95)),
        long_sleeves=bool(rng.uniform() < 0.4),
        shorts=bool(rng.uniform() < 0.45),
    )


def draw_figure(
    image: Image.Image,
    points: np.ndarray,
    depth: np.ndarray,
    known: np.ndarray,
    height_px: float,
    outfit: Outfit,
    prop: str | None = None,
) -> None:
    """Draw the figure into ``image`` (RGB, changed in place), antialiased.

    points (19, 2): continuous pixel coordinates; depth (19,): larger is nearer, body heights; known (19,): False leaves
    out what touches the point; height_px: pixels to one body height at the figure.
    """
    if not known.any():
        return
    reach = height_px * (0.85 if prop else 0.2)
    low = np.floor(points[known].min(0) - reach).astype(int)
    high = np.ceil(points[known].max(0) + reach).astype(int)
    left, top = max(low[0], 0), max(low[1], 0)
    right, bottom = min(high[0], image.size[0]), min(high[1], image.size[1])
    if right <= left or bottom <= top:
        return
    patch = image.crop((left, top, right, bottom))
    patch = patch.resize((patch.size[0] * _SUPERSAMPLE, patch.size[1] * _SUPERSAMPLE), Image.Resampling.NEAREST)
    # Pillow's coordinates are pixel centres, hence the half pixel.
    local = (points - (left, top)) * _SUPERSAMPLE - 0.5
    _Painter(patch, local, depth, known, height_px * _SUPERSAMPLE, outfit).paint(prop)
    image.paste(patch.reduce(_SUPERSAMPLE), (left, top))


def hidden_joints(points: np.ndarray, depth: np.ndarray, height_px: np.ndarray) -> np.ndarray:
    """Joints covered by a nearer part of the body: bool (T, 13) from points (T, 19, 2), depth (T, 19), height (T,)."""
    hidden = np.zeros((len(points), NUM_JOINTS), dtype=bool)
    parts = [(a, b, (ra + rb) / 2, 0.05) for a, b, ra, rb, _, _ in _LIMBS]
    # The trunk runs along both flanks and the spine.
    parts += [(1, 7, _TRUNK_RADIUS, 0.07), (2, 8, _TRUNK_RADIUS, 0.07), (NECK, 7, _TRUNK_RADIUS, 0.07)]
    trunk = {1, 2, 7, 8, NECK}
    joints, joint_depth = points[:, :NUM_JOINTS], depth[:, :NUM_JOINTS]
    for a, b, radius, margin in parts:
        start, axis = points[:, None, a], points[:, None, b] - points[:, None, a]
        along = ((joints - start) * axis).sum(-1) / np.maximum((axis**2).sum(-1), 1e-6)
        along = np.clip(along, 0, 1)
        distance = np.linalg.norm(joints - start - along[..., None] * axis, axis=-1)
        part_depth = depth[:, None, a] * (1 - along) + depth[:, None, b] * along
        covered = (distance < 0.85 * radius * height_px[:, None]) & (part_depth > joint_depth + margin)
        ends = trunk if {a, b} <= trunk else {a, b}
        covered[:, [joint for joint in ends if joint < NUM_JOINTS]] = False
        hidden |= covered
    return hidden


class _Painter:
    """Draws the parts of one figure from far to near on a supersampled patch."""

    def __init__(self, patch, points, depth, known, unit, outfit):
        self.draw = ImageDraw.Draw(patch)
        self.points, self.depth, self.known, self.unit, self.outfit = points, depth, known, unit, outfit

    def paint(self, prop: str | None) -> None:
        middle = float(np.mean(self.depth[[1, 2, 7, 8]]))
        jobs: list[tuple[float, Callable[[], None]]] = [(middle, self.trunk)]
        for part in _LIMBS:
            near = float(self.depth[part[0]] + self.depth[part[1]]) / 2
            jobs.append((near + part[5], partial(self.limb, part, near - middle)))
        jobs.append((float(self.depth[0]) + 0.02, self.head))
        if prop == "bench":
            jobs.append((-np.inf, self.bench))
            prop = "barbell"
        if prop is not None:
            nearest = float(max(self.depth[L_HAND], self.depth[R_HAND])) + 0.05
            behind = prop in ("bar", "barbell")
            jobs.append((nearest - 0.1 if behind else nearest, partial(self.prop, prop)))
        for _, job in sorted(jobs, key=lambda job: job[0]):
            job()

    def capsule(self, a, b, radius_a: float, radius_b: float, color) -> None:
        """A tapered, rounded stroke with a lighter side towards the upper left."""
        shift = np.array([-0.28, -0.22])
        lighter = shade(color, 1.14)
        for grow, fill, move in ((1.0, shade(color, 0.86), 0.0), (0.66, lighter, 1.0)):
            ra, rb = radius_a * grow * self.unit, radius_b * grow * self.unit
            p, q = a + shift * radius_a * self.unit * move, b + shift * radius_b * self.unit * move
            axis = q - p
            length = max(float(np.hypot(*axis)), 1e-6)
            normal = np.array([-axis[1], axis[0]]) / length
            corners = [p + normal * ra, q + normal * rb, q - normal * rb, p - normal * ra]
            self.draw.polygon([tuple(corner) for corner in corners], fill=fill)
            self.disc(p, ra, fill)
            self.disc(q, rb, fill)

    def disc(self, center, radius: float, fill) -> None:
        x, y = float(center[0]), float(center[1])
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def limb(self, part, nearness: float) -> None:
        a, b, radius_a, radius_b, cloth, _ = part
        if self.known[a] and self.known[b]:
            # Far limbs lie in the body's shade.
            color = shade(self.outfit.color(cloth), 1.0 + float(np.clip(nearness, -0.2, 0.1)))
            self.capsule(self.points[a], self.points[b], radius_a, radius_b, color)
            if cloth == "shirt" and not self.outfit.long_sleeves:
                # A bare stretch below the short sleeve.
                self.capsule(
                    self.points[a] * 0.35 + self.points[b] * 0.65, self.points[b], 0.028, 0.026, self.outfit.skin
                )
                self.capsule(self.points[a], self.points[a] * 0.4 + self.points[b] * 0.6, radius_a, 0.033, color)

    def trunk(self) -> None:
        p, known = self.points, self.known
        shirt, trousers = self.outfit.shirt, self.outfit.trousers
        if known[7] and known[8]:
            self.capsule(p[7], p[8], 0.052, 0.052, trousers)
        if known[NECK] and known[0]:
            self.capsule(p[NECK], p[0], _NECK_RADIUS, _NECK_RADIUS, shade(self.outfit.skin, 0.9))
        for shoulder, hip in ((1, 7), (2, 8)):
            if known[shoulder] and known[hip]:
                above_hip = p[hip] * 0.88 + p[shoulder] * 0.12
                self.capsule(p[shoulder], above_hip, _TRUNK_RADIUS * 0.8, _TRUNK_RADIUS * 0.85, shirt)
        if known[[1, 2, 7, 8]].all():
            quad = [p[1], p[2], p[8] * 0.9 + p[2] * 0.1, p[7] * 0.9 + p[1] * 0.1]
            self.draw.polygon([tuple(corner) for corner in quad], fill=shade(shirt, 1.0))
            hips = (p[7] + p[8]) / 2 * 0.85 + p[NECK] * 0.15
            self.capsule(p[NECK] * 0.8 + hips * 0.2, hips, _TRUNK_RADIUS, _TRUNK_RADIUS, shirt)

    def head(self) -> None:
        if not self.known[0]:
            return
        center = self.points[0]
        up = center - self.points[NECK] if self.known[NECK] else np.array([0.0, -1.0])
        up = up / max(float(np.hypot(*up)), 1e-6)
        ahead = (self.points[FACE] - center) / self.unit if self.known[FACE] else np.zeros(2)
        facing = float(self.depth[FACE] - self.depth[0]) if self.known[FACE] else 0.0
        radius = _HEAD_RADIUS * self.unit
        self.disc(center + up * radius * 0.22, radius, shade(self.outfit.hair, 1.0))
        self.disc(center - up * radius * 0.3, radius * 0.82, self.outfit.skin if facing > -0.03 else self.outfit.hair)
        if facing > -0.03:
            face = center - up * radius * 0.12 + ahead * self.unit * 0.42
            self.disc(face, radius * 0.84, shade(self.outfit.skin, 1.04))
            across = np.array([-up[1], up[0]])
            for side in (-0.34, 0.34):
                if facing > 0.02 or side * float(across @ ahead) > 0:
                    eye = face + across * radius * side + up * radius * 0.12
                    self.disc(eye, radius * 0.11, shade(self.outfit.hair, 0.5))

    def bench(self) -> None:
        """Under a lying trunk, as seen from beside it."""
        if not self.known[[0, 7, 8]].all():
            return
        head, hips = self.points[0], (self.points[7] + self.points[8]) / 2
        color, down = _PROP_COLORS["bench"], np.array([0.0, 1.0]) * self.unit
        self.capsule(head + 0.085 * down, hips + 0.085 * down, 0.022, 0.022, color)
        for share in (0.12, 0.88):
            foot = head * (1 - share) + hips * share
            self.capsule(foot + 0.09 * down, foot + 0.235 * down, 0.014, 0.014, shade(color, 0.8))

    def prop(self, kind: str) -> None:
        p, known, color = self.points, self.known, _PROP_COLORS[kind]
        if not known[[3, 4, 5, 6]].all():
            return
        grip = (p[L_HAND] + p[R_HAND]) / 2
        forearms = (p[L_HAND] + p[R_HAND]) - (p[3] + p[4])
        along = forearms / max(float(np.hypot(*forearms)), 1e-6)
        width = max(int(0.02 * self.unit), 1)
        if kind in ("barbell", "bar"):
            across = p[L_HAND] - p[R_HAND]
            across = across / max(float(np.hypot(*across)), 1e-6) * 0.24 * self.unit
            ends = p[R_HAND] - across, p[L_HAND] + across
            self.draw.line([tuple(end) for end in ends], fill=color, width=width)
            for end in ends if kind == "barbell" else ():
                self.disc(end, 0.075 * self.unit, color)
                self.disc(end, 0.045 * self.unit, shade(color, 1.5))
        elif kind == "ball":
            self.disc(p[R_HAND], 0.05 * self.unit, color)
        elif kind == "guitar":
            body = (p[7] + p[8]) / 2 * 0.55 + p[NECK] * 0.45
            self.draw.line([tuple(body), tuple(p[L_HAND])], fill=shade(color, 0.5), width=2 * width)
            self.disc(body, 0.10 * self.unit, color)
            self.disc(body, 0.035 * self.unit, shade(color, 0.4))
        elif kind == "rope":
            below = (p[11] + p[12]) / 2 + (0, 0.05 * self.unit)
            self.draw.line([tuple(p[L_HAND]), tuple(below), tuple(p[R_HAND])], fill=color, width=max(width // 2, 1))
        else:
            if kind == "racket":
                grip = p[R_HAND]
                along = p[R_HAND] - p[4]
                along = along / max(float(np.hypot(*along)), 1e-6)
            tip = grip + along * (0.5 if kind != "racket" else 0.22) * self.unit
            self.draw.line([tuple(grip), tuple(tip)], fill=color, width=width + (kind == "bat"))
            if kind == "racket":
                head = tip + along * 0.09 * self.unit
                self.disc(head, 0.085 * self.unit, color)
                self.disc(head, 0.066 * self.unit, (206, 212, 206))
            elif kind == "club":
                self.disc(tip, 0.025 * self.unit, color)


def _rgb(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue % 1, saturation, value))
    return red, green, blue
