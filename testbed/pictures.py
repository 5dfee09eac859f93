"""Scenes of coloured shapes, their captions, and a seeded renderer.

The base sees `SHAPES`, `FILLS` and no style; `HELD_OUT_*` are the concepts that people train.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from testbed.shapes import HELD_OUT_SHAPES, SHAPES

Rng = np.random.Generator
Array = NDArray[np.float32]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 222, 50),
    "green": (50, 165, 70),
    "cyan": (75, 205, 225),
    "blue": (45, 80, 210),
    "purple": (130, 50, 170),
    "pink": (245, 130, 185),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
FILLS = ("flat", "outline", "striped", "dotted", "checkered", "gradient")
HELD_OUT_FILLS = ("hatched", "ripple")
HELD_OUT_STYLES = ("sticker", "inked", "mosaic")
SIZES = {"small": 0.2, "medium": 0.29, "large": 0.39}  # radius / shorter side
POSITIONS = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
OPENINGS = ("a", "a photo of a", "a drawing of a")
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    fill: str = "flat"
    size: str = "medium"
    position: str = "center"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # one, or two side by side
    background: tuple[str, ...]  # one colour, or two from top to bottom
    style: str | None = None


def draw_scene(
    rng: Rng, *, plain: bool = False, shapes: tuple[str, ...] = tuple(SHAPES), fills: tuple[str, ...] = FILLS
) -> Scene:
    """A random scene; `plain` is one flat, medium, centred shape on one colour."""

    def pick(names: tuple[str, ...]) -> str:
        return names[int(rng.integers(len(names)))]

    names = [str(c) for c in rng.permutation(list(COLOURS))]
    if plain:
        return Scene((Thing(pick(shapes), names[0]),), (names[1],))
    background = (names[1], names[2]) if rng.random() < 0.15 else (names[1],)
    kind = rng.random()
    if kind < 0.12:
        first = Thing(pick(shapes), names[0], position="left", size="small")
        return Scene((first, Thing(pick(shapes), names[3], position="right", size="small")), background)
    fill = pick(fills) if rng.random() < 0.6 else "flat"
    size = pick(tuple(SIZES)) if rng.random() < 0.6 else "medium"
    free = size != "large" and rng.random() < 0.4
    return Scene((Thing(pick(shapes), names[0], fill, size, pick(tuple(POSITIONS)) if free else "center"),), background)


def describe(thing: Thing) -> str:
    """The words for one thing without its place; the defaults (medium, flat) are not said."""
    words = [
        thing.size if thing.size != "medium" else "",
        thing.fill if thing.fill != "flat" else "",
        thing.colour,
        thing.shape,
    ]
    return " ".join(w for w in words if w)


def caption(scene: Scene, opening: str = "a") -> str:
    """ "a small striped red star on the left on a blue background"; a style is never named."""
    back = " to ".join(scene.background) + (" gradient" if len(scene.background) == 2 else "")
    first = scene.things[0]
    if len(scene.things) == 2:
        text = f"{describe(first)} on the left and {_a(describe(scene.things[1]))} on the right"
    else:
        text = " ".join(filter(None, [describe(first), PLACES.get(first.position, "")]))
    opened = opening[:-1] + _a(text) if opening.endswith("a") else f"{opening} {text}"
    return f"{opened} on {_a(back)} background"


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def render(scene: Scene, rng: Rng, width: int = 64, height: int = 64) -> Image.Image:
    """The scene as an RGB picture; the rng only jitters place, turn, size and colours a little."""
    canvas = _background(scene.background, rng, width, height)
    for thing in scene.things:
        body, ink = _masks(thing, rng, width, height)
        first = _jittered(thing.colour, rng)
        canvas = _painted(canvas, body, ink, first, _second(first), scene.style)
    picture = Image.fromarray((canvas * 255 + 0.5).clip(0, 255).astype(np.uint8))
    if scene.style == "mosaic":
        small = picture.resize((width // 4, height // 4), Image.Resampling.BOX)
        picture = small.resize((width, height), Image.Resampling.NEAREST)
    return picture


def _jittered(colour: str, rng: Rng) -> Array:
    rgb = np.array(COLOURS[colour], np.float32) + rng.uniform(-7, 7, 3).astype(np.float32)
    return (rgb / 255).clip(0, 1)


def _second(rgb: Array) -> Array:
    """The other colour of a pattern: darker for light colours, lighter for dark ones."""
    light = float(rgb @ np.array([0.299, 0.587, 0.114], np.float32)) > 0.55
    return rgb * 0.4 if light else rgb + (1 - rgb) * 0.65


def _background(names: tuple[str, ...], rng: Rng, width: int, height: int) -> Array:
    ends = [_jittered(n, rng) for n in names]
    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    column = ends[0] * (1 - ramp) + ends[-1] * ramp
    return np.broadcast_to(column, (height, width, 3)).copy()


def _painted(canvas: Array, body: Array, ink: Array, first: Array, second: Array, style: str | None) -> Array:
    if style in ("sticker", "inked"):
        grown = _grown(body, 3)
        if style == "sticker":
            shadow = np.roll(_grown(grown, 1), (3, 3), (0, 1))[..., None]
            canvas = canvas * (1 - 0.55 * shadow)
        rim = np.float32(0.97) if style == "sticker" else np.float32(0.04)
        canvas = canvas * (1 - grown[..., None]) + rim * grown[..., None]
    colour = first * (1 - ink[..., None]) + second * ink[..., None]
    return canvas * (1 - body[..., None]) + colour * body[..., None]


def _grown(mask: Array, pixels: int) -> Array:
    image = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * pixels + 1))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), np.float32) / 255


def _masks(thing: Thing, rng: Rng, width: int, height: int) -> tuple[Array, Array]:
    """(body, ink), each [height, width] in 0..1: where the thing is, and where its second colour is."""
    side = min(width, height)
    radius = SIZES[thing.size] * side * rng.uniform(0.93, 1.07)
    jitter = rng.uniform(-0.03, 0.03, 2) * side
    dx, dy = POSITIONS[thing.position]
    cx, cy = width / 2 + dx * 0.23 * width + jitter[0], height / 2 + dy * 0.23 * height + jitter[1]
    turn = rng.uniform(-10, 10) * pi / 180
    frame = (cx, cy, radius, turn)
    body = _drawn(thing.shape, frame, (width, height), outline=thing.fill == "outline")
    return body, _ink(thing.fill, frame, width, height)


def _drawn(shape: str, frame: tuple[float, float, float, float], wh: tuple[int, int], outline: bool) -> Array:
    s = _SUPERSAMPLE
    cx, cy, radius, turn = frame
    c, d = cos(turn) * radius, sin(turn) * radius
    big = Image.new("L", (wh[0] * s, wh[1] * s), 0)
    pen = ImageDraw.Draw(big)
    for inside, points in {**SHAPES, **HELD_OUT_SHAPES}[shape]():
        corners = [((cx + c * x - d * y) * s, (cy + d * x + c * y) * s) for x, y in points]
        pen.polygon(corners, fill=255 if inside else 0)
    if outline:
        inner = big.filter(ImageFilter.BoxBlur(3.2 * s)).point(lambda v: 255 if v > 215 else 0)
        big = ImageChops.subtract(big, inner)
    return np.asarray(big.reduce(s), np.float32) / 255


def _ink(fill: str, frame: tuple[float, float, float, float], width: int, height: int) -> Array:
    cx, cy, radius, turn = frame
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    dx, dy = x + 0.5 - cx, y + 0.5 - cy
    u, v = dx * cos(turn) + dy * sin(turn), dy * cos(turn) - dx * sin(turn)
    if fill == "striped":
        return _edge(np.cos(u * (2 * pi / 9)), 9)
    if fill == "dotted":
        grid = np.hypot((u + 4.5) % 9 - 4.5, (v + 4.5) % 9 - 4.5)
        return (2.6 - grid + 0.5).clip(0, 1)
    if fill == "checkered":
        return _edge(np.sin(u * (pi / 6.5)) * np.sin(v * (pi / 6.5)), 8)
    if fill == "gradient":
        return ((v / radius) * 0.6 + 0.5).clip(0, 1)
    if fill == "hatched":
        a, b = (u + v) * 0.7071, (u - v) * 0.7071
        return np.maximum(_edge(np.cos(a * (2 * pi / 10)) - 0.45, 10), _edge(np.cos(b * (2 * pi / 10)) - 0.45, 10))
    if fill == "ripple":
        return _edge(np.cos(np.hypot(u, v) * (2 * pi / 9)), 9)
    return np.zeros_like(u)


def _edge(wave: Array, period: float) -> Array:
    """A smooth step at the wave's zero, about a pixel wide."""
    return (wave * period / (2 * pi) + 0.5).clip(0, 1)
