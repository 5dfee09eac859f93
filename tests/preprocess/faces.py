"""Faces that are drawn: skin, hair, eyes under brows, a nose and a mouth, in other colours, places and backgrounds."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
SKIN: tuple[Colour, ...] = ((225, 190, 165), (205, 160, 130), (240, 208, 185), (185, 140, 112))
HAIR: tuple[Colour, ...] = ((60, 40, 30), (25, 22, 22), (150, 105, 60), (110, 60, 35))
GROUND: tuple[Colour, ...] = ((150, 160, 170), (120, 150, 120), (190, 180, 150), (100, 120, 160), (170, 140, 150))
CLOTHES: tuple[Colour, ...] = ((60, 70, 140), (140, 60, 60), (70, 110, 80), (90, 90, 95))


def portrait(seed: int, size: tuple[int, int] = (240, 240)) -> tuple[Image.Image, tuple[float, float, float]]:
    """A person before a plain ground, and where the face is: middle x and y, and half its height, in pixels."""
    rng = np.random.default_rng(seed)

    def pick(colours: tuple[Colour, ...]) -> Colour:
        red, green, blue = np.clip(np.array(colours[int(rng.integers(len(colours)))]) + rng.integers(-8, 9, 3), 0, 255)
        return int(red), int(green), int(blue)

    scale = min(size) / 240 * rng.uniform(0.85, 1.25)
    x = size[0] * rng.uniform(0.4, 0.6)
    y = size[1] * rng.uniform(0.36, 0.48)
    tilt = rng.uniform(-5, 5)
    skin, hair, ground, clothes = pick(SKIN), pick(HAIR), pick(GROUND), pick(CLOTHES)
    image = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(image)
    draw.ellipse((x - 75 * scale, y + 62 * scale, x + 75 * scale, y + 260 * scale), fill=clothes)
    draw.rectangle((x - 15 * scale, y + 35 * scale, x + 15 * scale, y + 72 * scale), fill=_shaded(skin, 0.85))
    turned = Image.new("RGBA", size)
    _face(ImageDraw.Draw(turned), (x, y), scale, skin, hair)
    turned = turned.rotate(tilt, Image.Resampling.BICUBIC, center=(x, y))
    image.paste(turned, mask=turned.getchannel("A"))
    grain = rng.normal(0, 3, (*size[::-1], 1))
    noisy = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6 * scale)), np.float64) + grain
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), (x, y, 54 * scale)


def _face(draw: ImageDraw.ImageDraw, at: tuple[float, float], scale: float, skin: Colour, hair: Colour) -> None:
    def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        cx, cy = at[0] + x * scale, at[1] + y * scale
        return cx - w * scale, cy - h * scale, cx + w * scale, cy + h * scale

    draw.ellipse(box(0, -6, 44, 58), fill=hair)
    draw.ellipse(box(0, 4, 38, 48), fill=skin)
    for side in (-1, 1):
        draw.rectangle(box(15 * side, -14, 10, 2), fill=_shaded(hair, 1.1))
        draw.ellipse(box(15 * side, -5, 9, 5), fill=_shaded(skin, 0.55))
        draw.ellipse(box(15 * side, -5, 4, 4), fill=(20, 20, 20))
    draw.polygon([box(0, -2, 0, 0)[:2], box(-7, 16, 0, 0)[:2], box(7, 16, 0, 0)[:2]], fill=_shaded(skin, 0.86))
    draw.ellipse(box(0, 29, 14, 4), fill=(150, 70, 70))


def _shaded(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, round(part * factor)) for part in colour)  # type: ignore[return-value]
