"""The contact sheet: every picture as training will see it, on HTML pages that need no other file and on PNGs.

What the bucket cuts off is darkened and the rest framed; what a mask leaves out is tinted red.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from preprocess.buckets import cropped
from preprocess.crew import Crew
from preprocess.types import Item, Skipped
from trainer.rundir import RunDir, atomic_write

THUMB = 224  # pixels; the longer side of a picture on the sheet
PAGE = 100  # pictures; what is held in memory at once
_COLUMNS, _LINES, _LINE, _PAD = 6, 6, 15, 8  # of the PNG: lines of text below a picture, pixels
_FRAME, _MASKED, _WARNING = (0, 220, 120), (230, 30, 30), (180, 60, 0)

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; } .card { width: 224px; overflow-wrap: anywhere; }
.card img { display: block; margin-bottom: .3rem; } .size { color: #777; } .warning { color: #b43c00; }
code { background: #f6f6f6; }
"""


def write(
    run: RunDir,
    items: Sequence[Item],
    skipped: Sequence[Skipped],
    notes: Sequence[str],
    most: int,
    crew: Crew | None = None,
) -> list[Path]:
    """Writes RUN/sheet.html and RUN/sheet.png, from the 101st picture on sheet_2.html and so on; gives the pages.

    Args:
        notes: warnings; one that starts with a picture's source and a colon is shown with that picture.
        most: pictures shown; when there are more, those with a warning come first.
        crew: makes the small pictures [default: this process].
    """
    for stale in [*run.root.glob("sheet*.html"), *run.root.glob("sheet*.png")]:
        stale.unlink()
    crew = crew or Crew(workers=0)
    warnings = _by_source(items, notes)
    shown = list(items) if len(items) <= most else sorted(items, key=lambda item: not warnings[item.source])[:most]
    pages = [shown[start : start + PAGE] for start in range(0, len(shown), PAGE)] if most else []
    written: list[Path] = []
    for number, page in enumerate(pages, 1):
        thumbs = crew.local(partial(thumb, root=run.root), page, name=_source)
        texts = [[text.removeprefix(f"{item.source}: ") for text in warnings[item.source]] for item in page]
        head = f"{len(items)} pictures" + (f", {len(shown)} of them shown" if len(shown) < len(items) else "")
        picture = io.BytesIO()
        contact(page, thumbs, texts).save(picture, "PNG", compress_level=3)
        atomic_write(run.sheet_image(number), picture.getvalue())
        body = "".join(_card(*card) for card in zip(page, thumbs, texts, strict=True))
        left_out = _left_out(skipped) if number == len(pages) else ""
        links = _links(run, number, len(pages))
        atomic_write(run.sheet(number), _page(head, f"{links}<div class='cards'>{body}</div>{left_out}"))
        written.append(run.sheet(number))
    return written


def _by_source(items: Sequence[Item], notes: Sequence[str]) -> dict[str, list[str]]:
    """The notes of each picture; a source may have a colon in its own name."""
    found: dict[str, list[str]] = {item.source: [] for item in items}
    for note in notes:
        for colon in re.finditer(": ", note):
            if note[: colon.start()] in found:
                found[note[: colon.start()]].append(note)
    return found


def _source(item: Item) -> str:
    return item.source


def thumb(item: Item, root: Path) -> Image.Image:
    """The picture, small, with its crop framed and its mask laid over it."""
    with Image.open(root / item.file) as picture:
        small = picture.convert("RGB")
    scale = THUMB / max(small.size)
    size = max(1, round(small.width * scale)), max(1, round(small.height * scale))
    small = small.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if item.mask is not None:
        with Image.open(root / item.mask) as mask:
            grey = mask.convert("L").resize(small.size, Image.Resampling.BILINEAR)
        off = grey.point([(255 - value) * 6 // 10 for value in range(256)])  # tinted where the mask says no
        small.paste(Image.new("RGB", small.size, _MASKED), mask=off)
    left, top, right, bottom = (round(edge * THUMB / max(item.width, item.height)) for edge in cropped(item))
    shade = Image.new("L", small.size, 165)
    shade.paste(0, (left, top, right, bottom))
    small.paste(Image.new("RGB", small.size), mask=shade)
    ImageDraw.Draw(small).rectangle((left, top, right - 1, bottom - 1), outline=_FRAME, width=2)
    return small


def contact(items: Sequence[Item], thumbs: Sequence[Image.Image], warnings: Sequence[Sequence[str]]) -> Image.Image:
    """One picture of all cards, row by row. Letters that its font lacks are boxes; the page has them."""
    width, height = THUMB + 2 * _PAD, THUMB + _LINES * _LINE + 2 * _PAD
    rows = -(-len(items) // _COLUMNS)
    sheet = Image.new("RGB", (min(_COLUMNS, len(items)) * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for index, (item, small, warned) in enumerate(zip(items, thumbs, warnings, strict=True)):
        x, y = index % _COLUMNS * width + _PAD, index // _COLUMNS * height + _PAD
        sheet.paste(small, (x, y))
        lines = [(text, _WARNING) for text in _wrapped("; ".join(warned), font, 2)]
        about = [item.name, _size(item)]
        room = _LINES - len(lines) - len(about)
        lines = [(text, (20, 20, 20)) for text in [*_wrapped(item.caption, font, room), *about]] + lines
        for row, (text, colour) in enumerate(lines):
            draw.text((x, y + THUMB + 2 + row * _LINE), text, fill=colour, font=font)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int) -> list[str]:
    """The text in at most `most` lines that fit under a picture; what does not fit ends in dots."""
    lines = [""]
    for letter in text:  # letter by letter: a caption may be one long word, or know no spaces
        if font.getlength(lines[-1] + letter) > THUMB:
            cut = lines[-1].rfind(" ")
            head, rest = (lines[-1][:cut], lines[-1][cut + 1 :]) if cut > 0 else (lines[-1], "")
            lines[-1:] = [head, rest]
        if len(lines) > most:
            return [*lines[: most - 1], lines[most - 1][:-1] + "…"]
        lines[-1] += letter
    return [line for line in lines if line]


def _size(item: Item) -> str:
    return f"{item.width} x {item.height} -> {item.bucket[0]} x {item.bucket[1]}{', masked' if item.mask else ''}"


def _card(item: Item, small: Image.Image, warnings: Sequence[str]) -> str:
    picture = io.BytesIO()
    small.save(picture, "JPEG", quality=85)
    data = base64.b64encode(picture.getvalue()).decode()
    warned = "".join(f"<div class='warning'>{html.escape(text)}</div>" for text in warnings)
    return (
        f"<div class='card'><img src='data:image/jpeg;base64,{data}' width='{small.width}' height='{small.height}' "
        f"alt='{html.escape(item.name, quote=True)}'><div>{html.escape(item.caption)}</div>"
        f"<div class='size'>{html.escape(item.name)}<br>{_size(item)}</div>{warned}</div>\n"
    )


def _links(run: RunDir, number: int, pages: int) -> str:
    if pages == 1:
        return ""
    links = (str(n) if n == number else f"<a href='{run.sheet(n).name}'>{n}</a>" for n in range(1, pages + 1))
    return f"<p>Page {' '.join(links)}</p>"


def _left_out(skipped: Sequence[Skipped]) -> str:
    rows: Iterator[str] = (
        f"<li><code>{html.escape(skip.file)}</code>: {html.escape(skip.reason)}</li>" for skip in skipped
    )
    return f"<h2>Left out</h2><ul class='warning'>{''.join(rows)}</ul>" if skipped else ""


def _page(head: str, body: str) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{head}</title><style>{_STYLE}</style>"
        f"<h1>{head}</h1><p>Training sees what is inside the frame; what a mask leaves out is red.</p>{body}</html>\n"
    )
