"""HEIC with its extra and without; AVIF, which needs none."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image, ImageCms

from preprocess import PreprocessError, ingest
from preprocess.embedded import caption
from preprocess.heif import is_heif
from preprocess.picture import decode
from preprocess.types import Limits, PictureError
from trainer.extras import EXTRAS

LIMITS = Limits.model_validate({})
ROOT = Path(__file__).parents[2]


def sides(size: tuple[int, int] = (64, 48), left: str = "red", right: str = "blue") -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def heic(image: Image.Image | None = None, **options: Any) -> bytes:
    pillow_heif.register_heif_opener()
    buffer = io.BytesIO()
    (image or sides()).save(buffer, "HEIF", quality=100, chroma=444, **options)
    return buffer.getvalue()


def avif(**options: Any) -> bytes:
    buffer = io.BytesIO()
    sides().save(buffer, "AVIF", quality=100, subsampling="4:4:4", **options)
    return buffer.getvalue()


def saying(content: bytes, width: int, height: int) -> bytes:
    """`content` with another size in its header."""
    at = content.index(b"ispe") + 8
    return content[:at] + struct.pack(">II", width, height) + content[at + 8 :]


def close(found: Image.Image, wanted: Image.Image) -> bool:
    return found.size == wanted.size and int(np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max()) <= 6


@pytest.mark.parametrize("content", [heic(), avif()])
@pytest.mark.parametrize("name", ["a.heic", "a.avif", "a.jpg", "a"])
def test_content_decides_that_it_is_heic_or_avif(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    sides(left="green").save(tmp_path / "in/b.png")
    items, skipped = ingest(str(tmp_path / "in"), tmp_path / "run")
    assert skipped == []
    assert items[0].source == name
    with Image.open(tmp_path / "run" / items[0].file) as image:
        assert close(image, sides())


@pytest.mark.parametrize(
    ("brands", "after", "wanted"),
    [
        ("heic mif1 heic", b"", True),
        ("hevc", b"", True),
        ("mif1 mif1 heic", b"", True),
        ("mif1 mif1", b"", True),
        ("mif1 mif1 avif miaf", b"", False),
        ("msf1 avis", b"", False),
        ("mif1 avif heic", b"", True),
        ("mif1 mif1", b"avif", True),
        ("avif mif1 heic", b"", False),
        ("isom heic", b"", False),
    ],
)
def test_a_general_file_is_what_its_brands_say(brands: str, after: bytes, wanted: bool) -> None:
    """The first is its own; those of the rest of its first box it is compatible with. What follows the box is none."""
    major, *others = brands.encode().split()
    inside = major + bytes(4) + b"".join(others)
    assert is_heif(struct.pack(">I4s", 8 + len(inside), b"ftyp") + inside + after) == wanted


def test_a_single_heic_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(heic())
    (tmp_path / "b.avif").write_bytes(avif())
    items, _ = ingest(f"{tmp_path / 'a.heic'}|{tmp_path / 'b.avif'}", tmp_path / "run")
    assert [item.source for item in items] == ["a/a.heic", "b/b.avif"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("make", [heic, avif])
def test_a_turned_picture_is_turned_once(orientation: int, make: Any) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    sides().save(buffer, "PNG", exif=exif)
    content = make(exif=exif.tobytes())
    assert (b"irot" in content or b"imir" in content) == (orientation > 1)
    assert close(decode(content, LIMITS), decode(buffer.getvalue(), LIMITS))


def test_what_exif_alone_says_of_a_heic_does_not_turn_it() -> None:
    """ISO/IEC 23008-12 has pictures turned by their irot and imir; EXIF only repeats them."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = heic(exif=exif)
    assert b"irot" not in content
    assert pillow_heif.open_heif(io.BytesIO(content)).info["exif"] == exif.tobytes()
    assert close(decode(content, LIMITS), sides())


@pytest.mark.parametrize("make", [heic, avif])
def test_its_colours_are_those_of_its_profile(make: Any) -> None:
    """A profile whose red and blue change places: linear in the numbers, so the reference is a swap."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(srgb[at : at + 4]): at for at in range(132, 132 + 12 * struct.unpack(">I", srgb[128:132])[0], 12)}
    red, blue = (tags[name] + 4 for name in (b"rXYZ", b"bXYZ"))
    srgb[red : red + 8], srgb[blue : blue + 8] = srgb[blue : blue + 8], srgb[red : red + 8]
    assert close(decode(make(icc_profile=bytes(srgb)), LIMITS), sides(left="blue", right="red"))


def test_a_text_inside_is_read() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "a red flag"
    assert caption(heic(exif=exif), LIMITS) == "a red flag"


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 20_000)])
def test_a_size_that_is_too_much_is_refused_unread(size: tuple[int, int]) -> None:
    """Its cut-out stays 64 x 48, which is all that Pillow tells of it."""
    said = rf"it is {size[0]} x {size[1]} pixels, and 80000000 in all are allowed \(data\.limits\.pixels\)"
    with pytest.raises(PictureError, match=said):
        decode(saying(heic(), *size), LIMITS)
    with pytest.raises(PictureError, match="it is 64 x 64 pixels, and 3000 in all are allowed"):
        decode(heic(), Limits(pixels=3000))


def test_more_than_it_says_is_not_unpacked() -> None:
    with pytest.raises(PictureError, match=r"it is damaged: .*exceeds the maximum image size"):
        decode(saying(heic(sides((1024, 1024))), 64, 64), LIMITS)


@pytest.mark.parametrize("content", [heic(), avif()])
def test_a_part_of_one_is_damaged(content: bytes) -> None:
    for end in range(32, len(content), 7):
        with pytest.raises(PictureError, match=r"it is damaged: |is no picture"):
            decode(content[:end], LIMITS)


def test_changed_bytes_make_no_other_error() -> None:
    content, random = heic(), np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        for at in random.integers(0, len(content), 4):
            changed[at] = random.integers(256)
        try:
            image = decode(bytes(changed), Limits(pixels=100_000))
        except PictureError:
            continue
        assert image.width * image.height <= 100_000


def test_without_the_extra_it_is_left_out_with_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(heic())
    (tmp_path / "in/b.avif").write_bytes(avif())
    sides(left="green").save(tmp_path / "in/c.png")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    items, skipped = ingest(str(tmp_path / "in"), tmp_path / "run")
    assert [item.source for item in items] == ["b.avif", "c.png"]
    reason = "it is HEIC, which needs pillow-heif, and it is not installed: pip install 'pillow-heif==1.8.1'"
    assert [(skip.file, skip.reason) for skip in skipped] == [("a.jpg", reason)]
    with pytest.raises(PreprocessError, match="pip install 'pillow-heif"):
        ingest(str(tmp_path / "in/a.jpg"), tmp_path / "other")


def test_the_extras_are_the_versions_that_are_tested() -> None:
    asked = (ROOT / "requirements-dev.in").read_text(encoding="utf-8").splitlines()
    told = "".join((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("sources", "optimizers"))
    for requirement in EXTRAS.values():
        assert requirement in asked
        assert f"pip install '{requirement}'" in told or f"pip install {requirement}" in told
