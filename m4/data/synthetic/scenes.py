"""Textured backgrounds, larger than a frame so that a camera can move over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]
MARGIN = 48  # pixels of scenery beyond each side of a frame


@dataclass(frozen=True)
class Scene:
    """canvas: RGB, frame size plus MARGIN on each side. front, front_mask: what stands before the figure, if any."""

    canvas: Image.Image
    front: Image.Image | None = None
    front_mask: Image.Image | None = None


def make_scene(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """A random scene for frames of ``size`` (height, width)."""
    height, width = size[0] + 2 * MARGIN, size[1] + 2 * MARGIN
    horizon = MARGIN + int(size[0] * rng.uniform(0.42, 0.6))
    paint = _SCENES[int(rng.integers(len(_SCENES)))]
    canvas = paint(height, width, horizon, rng)
    texture = _noise(height, width, (3, 9, 40), rng)[..., None] * rng.uniform(5, 9)
    light = np.linspace(rng.uniform(-12, 12), rng.uniform(-12, 12), width)[None, :, None]
    canvas = Image.fromarray(np.clip(np.asarray(canvas, np.float32) + texture + light, 0, 255).astype(np.uint8))
    if rng.uniform() < 0.25:
        return Scene(canvas, *_foreground(height, width, rng))
    return Scene(canvas)


def _noise(height: int, width: int, cells: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise with features of several sizes (pixels), standard deviation about 1, float32 (height, width)."""
    total = np.zeros((height, width), np.float32)
    for cell in cells:
        coarse = rng.normal(size=(height // cell + 2, width // cell + 2)).astype(np.float32)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return total / np.sqrt(len(cells))


def _gradient(height: int, width: int, stops: list[tuple[int, Color]]) -> np.ndarray:
    rows = np.arange(height)
    at = [row for row, _ in stops]
    columns = [np.interp(rows, at, [color[channel] for _, color in stops]) for channel in range(3)]
    return np.repeat(np.stack(columns, -1)[:, None].astype(np.float32), width, axis=1)


def _image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def _vary(color: Color, rng: np.random.Generator, amount: float = 18) -> Color:
    red, green, blue = (int(np.clip(channel + rng.normal(0, amount), 0, 255)) for channel in color)
    return red, green, blue


def shade(color: Color, factor: float) -> Color:
    """``color`` darkened or brightened, within 0 … 255."""
    red, green, blue = (int(min(255, channel * factor)) for channel in color)
    return red, green, blue


def _sky(height: int, width: int, horizon: int, rng, ground_far, ground_near) -> np.ndarray:
    top, low = _vary((96, 150, 214), rng), _vary((196, 216, 232), rng)
    array = _gradient(height, width, [(0, top), (horizon - 1, low), (horizon, ground_far), (height, ground_near)])
    clouds = np.clip(_noise(height, width, (60, 25), rng) - 0.3, 0, 1)[..., None] * 45
    array[:horizon] += clouds[:horizon]
    return array


def _trees(draw: ImageDraw.ImageDraw, width: int, horizon: int, rng, color, count: int, size: tuple[int, int]) -> None:
    for _ in range(count):
        x, radius = rng.uniform(0, width), rng.uniform(*size)
        trunk = max(2, int(radius * 0.18))
        draw.rectangle(
            (x - trunk, horizon - radius, x + trunk, horizon + radius * 0.3), fill=_vary((84, 62, 44), rng, 8)
        )
        for _ in range(9):
            dx, dy = rng.normal(0, radius * 0.5), rng.normal(0, radius * 0.4)
            r = radius * rng.uniform(0.35, 0.65)
            center = x + dx, horizon - radius * 1.4 + dy
            draw.ellipse((center[0] - r, center[1] - r, center[0] + r, center[1] + r), fill=_vary(color, rng, 12))


def _park(height, width, horizon, rng):
    array = _sky(height, width, horizon, rng, _vary((118, 148, 80), rng), _vary((70, 112, 52), rng))
    array[horizon:] += _noise(height, width, (5, 14), rng)[horizon:, :, None] * 13
    image = _image(array)
    draw = ImageDraw.Draw(image)
    _trees(draw, width, horizon, rng, (52, 92, 46), 7, (height * 0.10, height * 0.22))
    path = _vary((176, 164, 140), rng, 8)
    draw.polygon([(0, height * 0.84), (width, height * 0.70), (width, height * 0.76), (0, height * 0.95)], fill=path)
    return image.filter(ImageFilter.GaussianBlur(0.8))


def _gym(height, width, horizon, rng):
    wall, floor = _vary((190, 184, 168), rng), _vary((166, 116, 70), rng)
    stops = [(0, wall), (horizon - 1, _vary(wall, rng, 6)), (horizon, floor), (height, _vary(floor, rng, 12))]
    image = _image(_gradient(height, width, stops))
    draw = ImageDraw.Draw(image)
    band = _vary((60, 90, 140), rng, 30)
    draw.rectangle((0, horizon - height * 0.10, width, horizon - 3), fill=band)
    step = width / int(rng.integers(4, 7))
    for column in np.arange(step * 0.25, width, step):
        draw.rectangle((column, height * 0.10, column + step * 0.5, height * 0.30), fill=_vary((216, 226, 236), rng, 8))
        draw.line((column + step * 0.25, height * 0.10, column + step * 0.25, height * 0.30), fill=wall, width=3)
    for offset in np.linspace(-2.2, 3.2, 26):
        line = (width * (0.5 + (offset - 0.5) * 0.4), horizon, width * (0.5 + (offset - 0.5) * 1.3), height)
        draw.line(line, fill=_vary(shade(floor, 0.85), rng, 5), width=1)
    return image


def _court(height, width, horizon, rng):
    surface, outside = _vary((58, 104, 160), rng), _vary((66, 128, 84), rng)
    array = _sky(height, width, horizon, rng, outside, _vary(outside, rng, 8))
    image = _image(array)
    draw = ImageDraw.Draw(image)
    _trees(draw, width, horizon, rng, (60, 98, 58), 6, (height * 0.08, height * 0.16))
    top, bottom = horizon + height * 0.06, height * 0.97
    corners = [(width * 0.22, top), (width * 0.80, top), (width * 1.05, bottom), (-width * 0.05, bottom)]
    draw.polygon(corners, fill=surface)
    white = (236, 238, 236)
    draw.line([*corners, corners[0]], fill=white, width=3)
    middle = (top + bottom) / 2
    draw.line((width * 0.085, middle, width * 0.925, middle), fill=white, width=3)
    draw.line((width * 0.5, top, width * 0.5, bottom), fill=white, width=3)
    fence = horizon - height * 0.22
    for x in np.arange(0, width, 9):
        draw.line((x, fence, x, horizon), fill=(112, 126, 120))
    for y in np.arange(fence, horizon, 9):
        draw.line((0, y, width, y), fill=(112, 126, 120))
    return image


def _beach(height, width, horizon, rng):
    array = _sky(height, width, horizon, rng, _vary((206, 190, 150), rng, 8), _vary((224, 206, 164), rng, 8))
    sea = int(horizon - height * 0.12)
    array[sea:horizon] = _gradient(horizon - sea, width, [(0, (52, 110, 150)), (horizon - sea, (120, 176, 186))])
    waves = np.sin(np.arange(height)[:, None] * 0.9 + _noise(height, width, (30,), rng) * 2)[..., None] * 9
    array[sea:horizon] += waves[sea:horizon]
    array[horizon:] += _noise(height, width, (4, 10, 30), rng)[horizon:, :, None] * 9
    return _image(array)


def _street(height, width, horizon, rng):
    brick = _vary((150, 92, 74), rng)
    stops = [(0, brick), (horizon - 1, brick), (horizon, _vary((140, 140, 142), rng, 8)), (height, (108, 108, 112))]
    image = _image(_gradient(height, width, stops))
    draw = ImageDraw.Draw(image)
    mortar = _vary((178, 164, 150), rng, 8)
    for row, y in enumerate(range(0, horizon, 10)):
        draw.line((0, y, width, y), fill=mortar)
        for x in range(12 * (row % 2), width, 24):
            draw.line((x, y, x, y + 10), fill=mortar)
    for x in np.arange(width * 0.06, width, width * 0.24):
        draw.rectangle((x, height * 0.12, x + width * 0.12, height * 0.33), fill=_vary((58, 70, 86), rng, 12))
        draw.rectangle((x, height * 0.12, x + width * 0.12, height * 0.33), outline=(224, 220, 210), width=3)
    for x in np.linspace(-width * 0.5, width * 1.5, 12):
        draw.line((width * 0.5 + (x - width * 0.5) * 0.45, horizon, x, height), fill=(92, 92, 96))
    draw.rectangle((0, horizon, width, horizon + 4), fill=(190, 188, 180))
    return image


def _studio(height, width, horizon, rng):
    wall = _vary((128, 134, 146), rng, 40)
    stops = [(0, shade(wall, 0.55)), (int(horizon * 0.8), wall), (horizon, shade(wall, 1.2)), (height, wall)]
    array = _gradient(height, width, stops)
    across = 1 - 0.35 * (np.linspace(-1, 1, width) ** 2)
    return _image(array * across[None, :, None])


def _field(height, width, horizon, rng):
    array = _sky(height, width, horizon, rng, _vary((96, 140, 70), rng, 10), _vary((84, 126, 60), rng, 10))
    stripes = (np.sin(np.arange(width)[None] * 2 * np.pi / (width / 7)) > 0)[..., None] * 9.0
    array[horizon:] += stripes
    array[horizon:] += _noise(height, width, (4, 12), rng)[horizon:, :, None] * 9
    image = _image(array)
    draw = ImageDraw.Draw(image)
    wall = horizon - height * 0.11
    panels = int(rng.integers(4, 8))
    for panel in range(panels):
        box = (width * panel / panels, wall, width * (panel + 1) / panels, horizon)
        draw.rectangle(box, fill=_vary((90, 96, 104), rng, 55))
    dirt = _vary((172, 124, 84), rng, 8)
    draw.ellipse((width * 0.15, height * 0.70, width * 0.85, height * 1.1), fill=dirt)
    return image.filter(ImageFilter.GaussianBlur(0.6))


def _room(height, width, horizon, rng):
    wall, floor = _vary((206, 196, 176), rng), _vary((126, 92, 66), rng)
    image = _image(_gradient(height, width, [(0, wall), (horizon, wall), (horizon + 1, floor), (height, floor)]))
    draw = ImageDraw.Draw(image)
    stripe = _vary(wall, rng, 10)
    for x in range(0, width, 36):
        draw.rectangle((x, 0, x + 15, horizon), fill=stripe)
    for _ in range(3):
        x, y = rng.uniform(0, width), rng.uniform(height * 0.08, height * 0.25)
        box = (x, y, x + width * 0.11, y + height * 0.14)
        draw.rectangle(box, fill=_vary((120, 120, 120), rng, 60), outline=(60, 44, 32), width=4)
    sofa, x = _vary((110, 60, 60), rng, 45), rng.uniform(0, width * 0.6)
    draw.rounded_rectangle((x, horizon - height * 0.14, x + width * 0.34, horizon + height * 0.05), 12, fill=sofa)
    rug = _vary((150, 130, 110), rng, 40)
    draw.ellipse((width * 0.1, height * 0.72, width * 0.9, height * 0.98), fill=rug)
    return image


_SCENES = (_park, _gym, _court, _beach, _street, _studio, _field, _room)


def _foreground(height: int, width: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A bush, a bench or a post between the camera and the figure."""
    front, mask = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    draw, cut = ImageDraw.Draw(front), ImageDraw.Draw(mask)
    base = height - MARGIN
    kind = int(rng.integers(3))
    x = rng.uniform(width * 0.25, width * 0.7)
    if kind == 0:
        for _ in range(26):
            r = rng.uniform(0.02, 0.05) * height
            cx, cy = x + rng.normal(0, width * 0.06), base - abs(rng.normal(0, height * 0.06))
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_vary((58, 94, 48), rng, 14))
            cut.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    elif kind == 1:
        color = _vary((112, 78, 50), rng, 14)
        for y in (0.80, 0.86):
            box = (x, height * y, x + width * 0.26, height * y + 9)
            draw.rectangle(box, fill=color)
            cut.rectangle(box, fill=255)
    else:
        box = (x, 0, x + width * 0.025, height)
        draw.rectangle(box, fill=_vary((92, 94, 98), rng, 16))
        cut.rectangle(box, fill=255)
    return front, mask
