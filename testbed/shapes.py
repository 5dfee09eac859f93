"""Outlines of the drawn shapes.

A shape is a list of polygons in a frame where the shape fills about the unit disc, y down; a
polygon that follows another one cuts a hole when its flag is False.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin

Point = tuple[float, float]
Polygon = tuple[bool, list[Point]]  # (True: draw, False: cut out), vertices


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, n: int = 40) -> list[Point]:
    """Points on an ellipse; angles in turns, clockwise on screen from the right."""
    turns = [start + (end - start) * i / n for i in range(n + 1)]
    return [(cx + rx * cos(2 * pi * a), cy + ry * sin(2 * pi * a)) for a in turns]


def _circle() -> list[Polygon]:
    return [(True, _arc(0, 0, 0.95, 0.95, 0, 1))]


def _ring() -> list[Polygon]:
    return [(True, _arc(0, 0, 0.98, 0.98, 0, 1)), (False, _arc(0, 0, 0.5, 0.5, 0, 1))]


def _square() -> list[Polygon]:
    return [(True, [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)])]


def _triangle() -> list[Polygon]:
    return [(True, [(0, -1), (1, 0.8), (-1, 0.8)])]


def _diamond() -> list[Polygon]:
    return [(True, [(0, -1.05), (0.62, 0), (0, 1.05), (-0.62, 0)])]


def _star() -> list[Polygon]:
    radii = [1.1, 0.42]
    return [(True, [(radii[i % 2] * sin(pi * i / 5), -radii[i % 2] * cos(pi * i / 5)) for i in range(10)])]


def _heart() -> list[Polygon]:
    turns = [2 * pi * i / 48 for i in range(48)]
    x = [sin(a) ** 3 for a in turns]
    y = [-(13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a)) / 16 for a in turns]
    return [(True, [(u, v + 0.1) for u, v in zip(x, y, strict=True)])]


def _moon() -> list[Polygon]:
    return [(True, _arc(-0.05, 0, 0.98, 0.98, 0, 1)), (False, _arc(0.42, 0, 0.74, 0.74, 0, 1))]


def _cross() -> list[Polygon]:
    a, b = 0.33, 0.98
    right = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
    return [(True, right + [(-x, -y) for x, y in right])]


def _arrow() -> list[Polygon]:
    head = [(0.1, -0.85), (1.05, 0), (0.1, 0.85)]
    return [(True, [(-1, -0.32), (0.1, -0.32), *head, (0.1, 0.32), (-1, 0.32)])]


def _hourglass() -> list[Polygon]:
    top = [(-0.8, -1), (0.8, -1), (0.12, 0), (-0.12, 0)]
    return [(True, top), (True, [(x, -y) for x, y in top])]


def _crown() -> list[Polygon]:
    return [(True, [(-1, -0.7), (-0.5, -0.05), (0, -0.9), (0.5, -0.05), (1, -0.7), (0.85, 0.75), (-0.85, 0.75)])]


def _mushroom() -> list[Polygon]:
    cap = _arc(0, 0.05, 1.05, 1.0, 0.5, 1.0)
    stem = [(-0.3, 0.05), (0.3, 0.05), (0.4, 1.0), (-0.4, 1.0)]
    return [(True, cap), (True, stem)]


def _fish() -> list[Polygon]:
    return [(True, _arc(0.25, 0, 0.8, 0.55, 0, 1)), (True, [(-0.4, 0), (-1.05, -0.65), (-1.05, 0.65)])]


def _house() -> list[Polygon]:
    walls = [(-0.72, -0.1), (0.72, -0.1), (0.72, 0.95), (-0.72, 0.95)]
    door = [(-0.2, 0.35), (0.2, 0.35), (0.2, 0.95), (-0.2, 0.95)]
    return [(True, [(-1.05, -0.1), (0, -1.05), (1.05, -0.1)]), (True, walls), (False, door)]


def _cat() -> list[Polygon]:
    ear = [(-0.95, -1.0), (-0.1, -0.55), (-0.8, 0.1)]
    return [(True, _arc(0, 0.2, 0.9, 0.75, 0, 1)), (True, ear), (True, [(-x, y) for x, y in ear])]


SHAPES: dict[str, Callable[[], list[Polygon]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "cross": _cross,
    "ring": _ring,
    "arrow": _arrow,
    "hourglass": _hourglass,
    "crown": _crown,
}
HELD_OUT_SHAPES: dict[str, Callable[[], list[Polygon]]] = {
    "mushroom": _mushroom,
    "fish": _fish,
    "house": _house,
    "cat": _cat,
}
