"""What the reference pose tells of the next one: where it tells all, where nothing, and the command on real files."""

import json
import math
import shutil

import pytest
import torch

from benchmarks.pose_limits import BINS, COORDINATES, NUM_JOINTS, PIXEL, Pairs, limits, neighbours
from tests.runs import REPOSITORY, run_command_line


def pairs(count: int, seed: int, moved) -> Pairs:
    """Poses anywhere, all joints visible; moved: float (N, 2, 13) pixels from places (N, 2, 13) in 0 … 1."""
    g = torch.Generator().manual_seed(seed)
    place = 0.2 + 0.6 * torch.rand(count, 2, NUM_JOINTS, generator=g)
    bins = (place * (BINS - 1)).long()
    steps = (moved(place, g) / PIXEL).round().long()
    visible = torch.ones(count, NUM_JOINTS, dtype=torch.long)
    return Pairs(*(torch.cat([xy.flatten(1), visible], dim=1) for xy in (bins, bins + steps)))


def by_chance(place, g):
    return torch.cat(
        [torch.zeros_like(place[:, :1]), 20.0 * torch.randint(-1, 2, place[:, :1].shape, generator=g)], dim=1
    )


def test_a_way_that_nobody_can_know_is_not_told():
    torch.manual_seed(0)
    train, held = (pairs(n, seed, by_chance) for n, seed in ((2000, 0), (500, 1)))
    figures = limits(train, held, steps=60, batch=64)
    copying = figures["error_px"]["copying"]
    assert copying == pytest.approx(20 * 2 / 3, rel=0.05)
    assert figures["error_px"]["regression"] > 0.97 * copying
    assert figures["error_px"]["neighbours"] > 0.97 * copying
    assert min(figures["error_px"]["by_tokens"].values()) > 0.97 * copying
    assert figures["nats_a_token"]["better_by"] < 0.02
    # One of three ways up or down, none to the side, and visibility that never changes.
    uniform = NUM_JOINTS * math.log(3) / (COORDINATES + NUM_JOINTS)
    assert figures["nats_a_token"]["histogram"] == pytest.approx(uniform, rel=0.02)
    assert figures["pairs"] == [2000, 500]


def to_the_middle(place, g):
    """A way of 20 pixels up or down that the place tells, in a pose and in its mirror image alike."""
    down = torch.where(place[:, 1:] < 0.5, 20.0, -20.0)
    return torch.cat([torch.zeros_like(down), down], dim=1)


def test_a_way_that_the_place_tells_is_found():
    torch.manual_seed(0)
    train, held = (pairs(n, seed, to_the_middle) for n, seed in ((4000, 0), (500, 1)))
    figures = limits(train, held, steps=200, batch=32)
    assert figures["error_px"]["copying"] == pytest.approx(20, rel=0.01)
    assert figures["error_px"]["regression"] < 10
    assert max(figures["error_px"]["by_tokens"].values()) < 10
    nats = figures["nats_a_token"]
    assert nats["histogram"] == pytest.approx(NUM_JOINTS * math.log(2) / (COORDINATES + NUM_JOINTS), rel=0.05)
    assert nats["better_by"] > 0.5 * nats["histogram"]


def test_neighbours_of_the_very_same_poses_know_all():
    train = pairs(300, 0, by_chance)
    assert neighbours(train, train) < 0.01


def test_the_command(tmp_path, picture_data):
    root, out = tmp_path / "tokens", tmp_path / "limits.json"
    shutil.copytree(picture_data, root)
    done = run_command_line("benchmarks.pose_limits", "--data", root, "--steps", 12, "--out", out, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["error_px"]["copying"] > 0
    assert "cpu" in figures["machine"]
    wrong = run_command_line("benchmarks.pose_limits", "--data", tmp_path / "none", cwd=REPOSITORY)
    assert wrong.returncode == 2
    assert "error: " in wrong.stderr
    assert "none" in wrong.stderr
