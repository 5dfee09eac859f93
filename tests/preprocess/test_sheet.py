"""The contact sheet shows what training sees: the crop, the mask, the caption, the warnings. Nothing else gets out."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from preprocess import build, sheet
from preprocess.types import Item, Skipped
from trainer.args import DataArgs
from trainer.rundir import RunDir


def item(root: Path, name: str = "a", size: tuple[int, int] = (64, 64), **options: Any) -> Item:
    (root / "cache").mkdir(exist_ok=True)
    Image.new("RGB", size, "white").save(root / f"cache/{name}.png")
    settings: dict[str, Any] = {"bucket": (64, 64), "caption": f"a TOK {name}", **options}
    return Item(name, f"cache/{name}.png", "0" * 64, *size, f"{name}.jpg", **settings)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


def test_what_the_bucket_cuts_off_is_dark_and_the_rest_is_framed(tmp_path: Path) -> None:
    shown = pixels(sheet.thumb(item(tmp_path, size=(128, 64)), tmp_path))
    assert shown.shape == (sheet.THUMB // 2, sheet.THUMB, 3)
    middle = shown[sheet.THUMB // 4]
    quarter = sheet.THUMB // 4  # 64 of 128 pixels, from the middle
    assert (middle[: quarter - 1] < 100).all()
    assert (middle[3 * quarter + 1 :] < 100).all()
    assert (middle[quarter + 3 : 3 * quarter - 3] == 255).all()
    assert (middle[quarter] == (0, 220, 120)).all()
    assert (middle[3 * quarter - 1] == (0, 220, 120)).all()


def test_a_crop_that_is_not_in_the_middle_is_shown_where_it_is(tmp_path: Path) -> None:
    row = pixels(sheet.thumb(item(tmp_path, size=(128, 64), centering=(0.0, 0.5)), tmp_path))[sheet.THUMB // 4]
    assert (row[4 : sheet.THUMB // 2 - 4] == 255).all()
    assert (row[sheet.THUMB // 2 + 1 :] < 100).all()


def test_what_a_mask_leaves_out_is_red(tmp_path: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    picture = item(tmp_path, mask="cache/a.mask.png")
    mask.save(tmp_path / "cache/a.mask.png")
    row = pixels(sheet.thumb(picture, tmp_path))[sheet.THUMB // 2]
    red, white = row[sheet.THUMB // 4], row[3 * sheet.THUMB // 4]
    assert (white == 255).all()
    assert red[0] > 200 > 130 > red[1] > 90  # the picture still shows through


class Page(HTMLParser):
    """Collects what a browser would show and fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_page_shows_text_as_text_and_needs_no_other_file(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> & 'TOK' \"x\" ü 日本"
    items = [item(tmp_path, "a", caption=nasty), item(tmp_path, "b")]
    notes = ["b.jpg: 40% of it is <b>cut</b> off", "of no picture"]
    pages = sheet.write(RunDir(tmp_path), items, [Skipped("c'<i>.png", "it is <u>damaged</u>")], notes, 500)
    assert pages == [tmp_path / "sheet.html"]
    page = Page(pages[0].read_text(encoding="utf-8"))
    for text in (nasty, "a TOK b", "40% of it is <b>cut</b> off", "c'<i>.png", "it is <u>damaged</u>", "64 x 64"):
        assert text in page.text
    assert not {"script", "b", "i", "u", "link"} & {tag for tag, _ in page.tags}
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    for attributes in images:
        content = base64.b64decode(str(attributes["src"]).removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == (sheet.THUMB, sheet.THUMB)


def test_the_picture_of_the_page_holds_each_thumbnail(tmp_path: Path) -> None:
    items = [item(tmp_path, name) for name in "abcdefghi"]
    sheet.write(RunDir(tmp_path), items, [], [], 500)
    with Image.open(tmp_path / "sheet.png") as picture:
        whole = pixels(picture.convert("RGB"))
    expected = pixels(sheet.thumb(items[8], tmp_path))
    cell = sheet.THUMB + 16
    y, x = whole.shape[0] // 2 + 8, 2 * cell + 8  # the ninth is the third of the second row
    assert (whole[y : y + sheet.THUMB, x : x + sheet.THUMB] == expected).all()
    below = whole[y + sheet.THUMB : y + sheet.THUMB + 50, x : x + sheet.THUMB]
    assert (below < 100).any()  # its text
    assert (whole[y:, 3 * cell :] == 255).all()  # and no tenth


def test_long_text_stays_below_its_picture(tmp_path: Path) -> None:
    words = [item(tmp_path, "a", caption="many words " * 80), item(tmp_path, "b", caption="x" * 3000)]
    thumbs = [sheet.thumb(one, tmp_path) for one in words]
    image = pixels(sheet.contact(words, thumbs, [["warning " * 90]] * 2))
    assert image.shape[0] == sheet.THUMB + 16 + 6 * 15
    assert (image[:, sheet.THUMB + 9 : sheet.THUMB + 16 + 7] == 255).all()  # between the two


@pytest.mark.parametrize("text", ["many words " * 80, "x" * 3000])
def test_text_that_does_not_fit_ends_in_dots(text: str) -> None:
    font = ImageFont.load_default(12)
    lines = sheet._wrapped(text, font, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= sheet.THUMB for line in lines[:-1])
    assert sheet._wrapped("two words", font, 3) == ["two words"]


def test_many_pictures_make_pages_that_lead_to_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "PAGE", 2)
    run, items = RunDir(tmp_path), [item(tmp_path, name) for name in "abcde"]
    assert sheet.write(run, items, [], [], 500) == [run.sheet(1), run.sheet(2), run.sheet(3)]
    names = [re.findall(r"a TOK (\w)", run.sheet(n).read_text()) for n in (1, 2, 3)]
    assert names == [["a", "b"], ["c", "d"], ["e"]]
    assert re.findall(r"href='(\w+\.html)'", run.sheet(2).read_text()) == ["sheet.html", "sheet_3.html"]
    assert run.sheet_image(3).is_file()
    sheet.write(run, items[:1], [], [], 500)  # what an earlier, longer dataset left would be wrong
    assert sorted(path.name for path in tmp_path.glob("sheet*")) == ["sheet.html", "sheet.png"]


def test_of_too_many_those_with_a_warning_are_shown_first(tmp_path: Path) -> None:
    items = [item(tmp_path, name) for name in "abcd"]
    sheet.write(RunDir(tmp_path), items, [], ["c.jpg: look here"], 2)
    page = (tmp_path / "sheet.html").read_text()
    assert re.findall(r"a TOK (\w)", page) == ["c", "a"]
    assert "4 pictures, 2 of them shown" in page


@pytest.mark.parametrize("count", [0, 500])
def test_a_dataset_comes_with_its_sheet_unless_it_is_not_wanted(count: int, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name, colour in {"a": "red", "b": "blue"}.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"source/{name}.png")
    data = DataArgs.model_validate({"source": "", "sheet": count})
    build(str(tmp_path / "source"), tmp_path / "run", data, resolution=32, step=16)
    assert (tmp_path / "run/sheet.html").exists() == (tmp_path / "run/sheet.png").exists() == bool(count)
