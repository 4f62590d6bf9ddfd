"""Human motion as keyframed joint angles, and forward kinematics to 3-D points. Lengths are in body heights.

Axes of the body: x to its left, y up, z forward. Angles are degrees: ``flex`` swings a limb forward, ``abd`` sideways
and outward, ``elbow`` and ``knee`` bend, ``rot`` turns the upper arm inward about its own axis; ``pitch``, ``roll``,
``yaw`` turn the pelvis; ``bend``, ``side``, ``twist`` turn the trunk against it. A key without ``l_`` or ``r_`` sets
both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m4.data.penn_action import NUM_JOINTS

# Points beyond the 13 joints, in this order, that the drawing needs.
EXTRA_POINTS = ("neck", "left hand", "right hand", "left toes", "right toes", "face")
NECK, L_HAND, R_HAND, L_TOES, R_TOES, FACE = range(NUM_JOINTS, NUM_JOINTS + len(EXTRA_POINTS))
NUM_POINTS = NUM_JOINTS + len(EXTRA_POINTS)

_SHOULDER, _HIP, _TRUNK, _HEAD = 0.115, 0.06, 0.30, 0.115
_UPPER_ARM, _FOREARM, _HAND, _THIGH, _SHIN, _FOOT = 0.165, 0.145, 0.045, 0.235, 0.235, 0.10
BAR_HEIGHT = 1.22


@dataclass(frozen=True)
class Motion:
    """Poses visited in turn. ``seconds``: one cycle. ``once``: played through and held, instead of repeated.

    ``speed``: travel along the facing direction in body heights a second. ``anchor``: what stays put, "ground" (the
    lowest point of the body touches it) or "bar" (the wrists hang at a fixed height).
    """

    poses: tuple[dict[str, float], ...]
    seconds: float
    once: bool = False
    speed: float = 0.0
    anchor: str = "ground"
    prop: str | None = None
    views: tuple[str, ...] = ("front", "back", "left", "right")


def _swing(back: dict, address: dict, finish: dict) -> tuple[dict, ...]:
    """A hit: get ready, wind up, strike, follow through."""
    return (address, back, back, address, finish, finish)


_STANCE = dict(leg_flex=22, knee=28, leg_abd=12, bend=22)
_SQUAT = dict(leg_flex=105, knee=118, leg_abd=18, bend=38, foot=-15)
_LYING = dict(pitch=-90, leg_flex=6, knee=92, leg_abd=14)  # on a bench, feet on the floor
_STRUM = dict(l_arm_flex=33, l_elbow=92, l_arm_abd=31, r_arm_abd=22)
_PLANK = dict(pitch=80, arm_abd=12, knee=2)

MOTIONS: dict[str, Motion] = {
    "walk": Motion(
        (
            dict(l_leg_flex=28, r_leg_flex=-20, l_knee=4, r_knee=22, l_arm_flex=-24, r_arm_flex=26, elbow=18),
            dict(l_leg_flex=4, r_leg_flex=18, l_knee=6, r_knee=58, arm_flex=0, elbow=22, twist=4),
            dict(r_leg_flex=28, l_leg_flex=-20, r_knee=4, l_knee=22, r_arm_flex=-24, l_arm_flex=26, elbow=18),
            dict(r_leg_flex=4, l_leg_flex=18, r_knee=6, l_knee=58, arm_flex=0, elbow=22, twist=-4),
        ),
        seconds=1.1,
        speed=0.55,
        views=("left", "right"),
    ),
    "jumping_jacks": Motion(
        (
            dict(arm_abd=12, leg_abd=2, knee=8, leg_flex=4),
            dict(arm_abd=95, leg_abd=14, hop=0.07),
            dict(arm_abd=168, leg_abd=26, knee=4),
            dict(arm_abd=95, leg_abd=14, hop=0.07),
        ),
        seconds=1.0,
        views=("front", "back"),
    ),
    "jump_rope": Motion(
        (
            dict(arm_abd=22, elbow=55, rot=-35, leg_flex=14, knee=26),
            dict(arm_abd=26, elbow=62, rot=-45, hop=0.09, knee=12, foot=-35),
        ),
        seconds=0.6,
        prop="rope",
    ),
    "squat": Motion(
        (dict(arm_abd=35, elbow=135, rot=-60), dict(_SQUAT, arm_abd=40, elbow=135, rot=-50), dict(_SQUAT, bend=30)),
        seconds=2.4,
        prop="barbell",
    ),
    "clean_and_jerk": Motion(
        (
            dict(_SQUAT, bend=52, arm_flex=42, arm_abd=12),
            dict(leg_flex=20, knee=22, bend=25, arm_flex=28, arm_abd=12),
            dict(leg_flex=40, knee=55, arm_flex=55, elbow=140, arm_abd=20),
            dict(arm_flex=60, elbow=135, arm_abd=15),
            dict(arm_abd=160, elbow=4, leg_abd=10),
            dict(arm_abd=160, elbow=4, leg_abd=10),
        ),
        seconds=3.0,
        prop="barbell",
    ),
    "golf_swing": Motion(
        _swing(
            dict(_STANCE, twist=-62, arm_flex=110, l_rot=60, r_elbow=75, bend=26),
            dict(_STANCE, arm_flex=42, rot=22, bend=34),
            dict(_STANCE, twist=85, arm_flex=118, l_elbow=80, rot=45, bend=4, r_knee=48, yaw=25),
        ),
        seconds=2.0,
        prop="club",
    ),
    "baseball_swing": Motion(
        _swing(
            dict(_STANCE, twist=-55, arm_flex=78, elbow=95, rot=50, r_arm_abd=25),
            dict(_STANCE, twist=10, arm_flex=70, elbow=20, rot=45, l_leg_flex=30),
            dict(_STANCE, twist=95, arm_flex=95, elbow=85, rot=60, yaw=30, bend=8),
        ),
        seconds=1.6,
        prop="bat",
    ),
    "baseball_pitch": Motion(
        (
            dict(arm_flex=55, elbow=105, rot=40),
            dict(l_leg_flex=95, l_knee=95, arm_flex=60, elbow=110, rot=40, bend=-6, twist=-25),
            dict(l_leg_flex=50, l_knee=30, r_leg_flex=-25, r_knee=25, r_arm_abd=95, r_elbow=80, r_rot=-80, twist=-45),
            dict(l_leg_flex=45, l_knee=40, r_leg_flex=-35, r_knee=30, r_arm_flex=125, r_elbow=35, bend=25, twist=25),
            dict(l_leg_flex=40, l_knee=35, r_leg_flex=-10, r_knee=75, r_arm_flex=40, r_rot=40, bend=52, twist=55),
        ),
        seconds=1.8,
        once=True,
        speed=0.15,
        prop="ball",
    ),
    "bowl": Motion(
        (
            dict(bend=12, r_arm_flex=35, r_elbow=70, l_arm_flex=45, l_elbow=80, leg_flex=8, knee=12),
            dict(bend=22, l_leg_flex=28, l_knee=20, r_leg_flex=-10, r_knee=25, r_arm_flex=-10, l_arm_abd=45),
            dict(bend=38, r_leg_flex=30, r_knee=30, l_leg_flex=-15, l_knee=30, r_arm_flex=-65, l_arm_abd=75),
            dict(bend=52, l_leg_flex=82, l_knee=75, r_leg_flex=-28, r_knee=45, r_arm_flex=25, l_arm_abd=80),
            dict(bend=40, l_leg_flex=70, l_knee=68, r_leg_flex=-30, r_knee=42, r_arm_flex=125, l_arm_abd=70),
        ),
        seconds=2.0,
        once=True,
        speed=0.35,
        prop="ball",
    ),
    "tennis_forehand": Motion(
        _swing(
            dict(_STANCE, twist=-60, r_arm_abd=65, r_arm_flex=-20, r_elbow=40, l_arm_flex=60),
            dict(_STANCE, twist=5, r_arm_flex=55, r_arm_abd=25, r_elbow=25, l_arm_flex=35, l_elbow=50),
            dict(_STANCE, twist=65, r_arm_flex=105, r_elbow=100, r_rot=70, l_arm_abd=35, l_elbow=60, bend=8),
        ),
        seconds=1.5,
        prop="racket",
    ),
    "tennis_serve": Motion(
        (
            dict(leg_abd=8, r_arm_flex=35, r_elbow=60, l_arm_flex=45, l_elbow=30),
            dict(_STANCE, bend=-10, l_arm_flex=172, r_arm_abd=85, r_elbow=100, r_rot=-70, twist=-35),
            dict(bend=-4, hop=0.06, l_arm_flex=60, l_elbow=80, r_arm_flex=172, r_arm_abd=8, foot=-30),
            dict(bend=42, l_leg_flex=30, r_leg_flex=-20, r_knee=50, r_arm_flex=35, r_rot=35, twist=40, l_elbow=70),
        ),
        seconds=2.0,
        once=True,
        prop="racket",
    ),
    "strum_guitar": Motion(
        (
            dict(_STRUM, r_elbow=95, r_rot=62, nod=18, leg_abd=6, side=-9, twist=-14, r_knee=18, r_leg_flex=10),
            dict(_STRUM, r_elbow=62, r_rot=40, nod=6, leg_abd=9, side=11, twist=12, l_knee=22, l_leg_flex=13, bend=6),
        ),
        seconds=0.8,
        prop="guitar",
        views=("front",),
    ),
    "pullup": Motion(
        (
            dict(arm_abd=165, elbow=10, knee=45, leg_flex=12),
            dict(arm_abd=112, elbow=118, rot=-90, knee=60, leg_flex=22),
        ),
        seconds=2.0,
        anchor="bar",
        prop="bar",
        views=("front", "back"),
    ),
    "pushup": Motion(
        (
            dict(_PLANK, pitch=66, arm_flex=72, elbow=4),
            dict(_PLANK, pitch=80, arm_flex=18, arm_abd=38, elbow=88),
        ),
        seconds=1.6,
        views=("left", "right"),
    ),
    "situp": Motion(
        (
            dict(pitch=-88, leg_flex=52, knee=98, arm_flex=150, elbow=120, leg_abd=6),
            dict(pitch=-62, bend=58, leg_flex=78, knee=98, arm_flex=95, elbow=95, leg_abd=6, nod=15),
            dict(pitch=-40, bend=72, leg_flex=98, knee=98, arm_flex=70, elbow=60, leg_abd=6, nod=20),
        ),
        seconds=2.2,
        views=("left", "right"),
    ),
    "bench_press": Motion(
        (dict(_LYING, arm_flex=90, arm_abd=15), dict(_LYING, arm_flex=25, arm_abd=55, elbow=95, rot=-10)),
        seconds=2.0,
        prop="bench",
        views=("left", "right"),
    ),
}

_SIDED = ("arm_flex", "arm_abd", "elbow", "rot", "leg_flex", "leg_abd", "knee", "foot")
_WHOLE = ("pitch", "roll", "yaw", "bend", "side", "twist", "nod", "hop", "lift")
_LIMITS = {
    "elbow": (0, 150),
    "knee": (0, 145),
    "arm_flex": (-70, 180),
    "arm_abd": (0, 178),
    "leg_flex": (-40, 125),
    "leg_abd": (-5, 50),
    "bend": (-25, 85),
    "twist": (-95, 95),
    "hop": (0, 0.3),
}


def animate(motion: Motion, times: np.ndarray, yaw: float, rng: np.random.Generator) -> np.ndarray:
    """Points (T, 19, 3) of a body doing ``motion`` at ``times`` (T,) seconds, facing ``yaw`` degrees (0: the camera).

    ``rng`` varies amplitude, rhythm, starting phase and posture. x to the right of the picture, y up (ground at 0),
    z towards the camera.
    """
    angles = _angles(motion, times, rng)
    points = _kinematics(angles, yaw)
    if motion.anchor == "bar":
        height = BAR_HEIGHT - points[:, 5:7, 1].mean(1)
    else:
        # Half the thickness of what rests on the ground; the ankle sits above the sole.
        clearance = np.full(NUM_POINTS, 0.03)
        clearance[[0, 1, 2, 7, 8]] = 0.06
        height = angles["hop"] + angles["lift"] - (points[..., 1] - clearance).min(1)
    points[..., 1] += height[:, None]
    travel = motion.speed * (times - times.mean()) * rng.uniform(0.6, 1.2)
    heading = np.radians(yaw)
    points[..., 0] += (travel * np.sin(heading))[:, None]
    points[..., 2] += (travel * np.cos(heading))[:, None]
    return points


def _angles(motion: Motion, times: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    poses = motion.poses
    cycle = motion.seconds * rng.uniform(0.85, 1.2)
    if motion.once:
        phase = np.clip(times / (times[-1] + 1e-9) * rng.uniform(1.0, 1.25) - rng.uniform(0, 0.1), 0, 1) * (
            len(poses) - 1
        )
    else:
        phase = (times / cycle + rng.uniform()) % 1.0 * len(poses)
    index = np.floor(phase).astype(int)
    fraction = phase - index
    if motion.once:
        first, second = np.minimum(index, len(poses) - 1), np.minimum(index + 1, len(poses) - 1)
    else:
        first, second = index % len(poses), (index + 1) % len(poses)
    ease = fraction * fraction * (3 - 2 * fraction)
    sway = np.sin(2 * np.pi * (times[:, None] * np.array([0.31, 0.47]) + rng.uniform(size=2)))
    amplitude = rng.uniform(0.85, 1.12)

    def channel(name: str, base: str) -> np.ndarray:
        keys = np.array([float(pose.get(name, pose.get(base, 0.0))) for pose in poses])
        if base not in ("hop", "lift", "pitch"):
            keys = keys * amplitude + rng.normal(0, 2.5, len(keys))
        value = keys[first] * (1 - ease) + keys[second] * ease
        if base not in ("hop", "lift"):
            value = value + sway @ rng.normal(0, 1.2, 2)
        return np.clip(value, *_LIMITS[base]) if base in _LIMITS else value

    angles = {name: channel(name, name) for name in _WHOLE}
    for name in _SIDED:
        for side in ("l", "r"):
            angles[f"{side}_{name}"] = channel(f"{side}_{name}", name)
    return angles


def _rotation(axis: str, degrees: np.ndarray) -> np.ndarray:
    """Rotation matrices (T, 3, 3) about a coordinate axis."""
    angle = np.radians(degrees)
    c, s = np.cos(angle), np.sin(angle)
    zero, one = np.zeros_like(c), np.ones_like(c)
    rows = {
        "x": [[one, zero, zero], [zero, c, -s], [zero, s, c]],
        "y": [[c, zero, s], [zero, one, zero], [-s, zero, c]],
        "z": [[c, -s, zero], [s, c, zero], [zero, zero, one]],
    }[axis]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _kinematics(a: dict[str, np.ndarray], yaw: float) -> np.ndarray:
    """Forward kinematics with the pelvis at the origin: (T, 19, 3)."""
    root = _rotation("y", a["yaw"] + yaw) @ _rotation("x", a["pitch"]) @ _rotation("z", a["roll"])
    trunk = root @ _rotation("y", a["twist"]) @ _rotation("x", a["bend"]) @ _rotation("z", a["side"])
    head = trunk @ _rotation("x", a["nod"])

    def along(frame: np.ndarray, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> np.ndarray:
        return frame @ np.array([x, y, z])

    points = np.zeros((len(root), NUM_POINTS, 3))
    neck = along(trunk, y=_TRUNK)
    points[:, NECK] = neck
    points[:, 0] = neck + along(head, y=_HEAD, z=0.012)
    points[:, FACE] = points[:, 0] + along(head, z=0.06)
    for side, sign, first in (("l", 1, 0), ("r", -1, 1)):
        shoulder = neck + along(trunk, x=sign * _SHOULDER, y=-0.02)
        arm = trunk @ _rotation("z", sign * a[f"{side}_arm_abd"]) @ _rotation("x", -a[f"{side}_arm_flex"])
        arm = arm @ _rotation("y", -sign * a[f"{side}_rot"])
        elbow = shoulder + along(arm, y=-_UPPER_ARM)
        forearm = arm @ _rotation("x", -a[f"{side}_elbow"])
        wrist = elbow + along(forearm, y=-_FOREARM)
        hip = along(root, x=sign * _HIP)
        leg = root @ _rotation("z", sign * (a[f"{side}_leg_abd"] + 2)) @ _rotation("x", -a[f"{side}_leg_flex"])
        knee = hip + along(leg, y=-_THIGH)
        shin = leg @ _rotation("x", a[f"{side}_knee"])
        ankle = knee + along(shin, y=-_SHIN)
        foot = shin @ _rotation("x", -a[f"{side}_foot"])
        points[:, [1 + first, 3 + first, 5 + first]] = np.stack([shoulder, elbow, wrist], 1)
        points[:, [7 + first, 9 + first, 11 + first]] = np.stack([hip, knee, ankle], 1)
        points[:, L_HAND + first] = wrist + along(forearm, y=-_HAND)
        points[:, L_TOES + first] = ankle + along(foot, y=-0.025, z=_FOOT)
    return points
