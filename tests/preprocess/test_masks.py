"""Masks: from files, from transparency, by face, by text; feathered, and told when there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, text_config
from PIL import Image, ImageDraw
from pydantic import ValidationError
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessor

from preprocess import PreprocessError, Report, build, maskers
from preprocess.masks import owner
from trainer import cli
from trainer.args import DataArgs, MaskArgs
from trainer.registry import PartError


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def run(source: Path, out: Path, **options: Any) -> Report:
    data = DataArgs.model_validate({"source": str(source), "masks": True, **options})
    return build(str(source), out, data, resolution=64, step=16)


def mask_of(report: Report, name: str, out: Path) -> np.ndarray[Any, Any] | None:
    (item,) = [item for item in report.items if item.name == name]
    if item.mask is None:
        return None
    with Image.open(out / item.mask) as mask:
        assert (mask.mode, mask.size) == ("L", (item.width, item.height))
        return np.asarray(mask)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for i, name in enumerate("ab"):
        noise(i).save(folder / f"{name}.png")
    return folder


# --- from the source


@pytest.mark.parametrize(
    ("path", "picture"),
    [
        ("masks/x.png", "x"),
        ("masks/a/X.png", "a/x"),
        ("a/Masks/x.png", "a/x"),
        ("masks/a/masks/x.png", "masks/a/x"),
        ("a/x.png", None),
        ("masks.png", None),
        ("a/masks", None),
    ],
)
def test_what_a_mask_in_a_folder_belongs_to(path: str, picture: str | None) -> None:
    assert owner(path) == picture


def test_masks_in_a_folder_are_found_and_are_no_pictures(source: Path, tmp_path: Path) -> None:
    (source / "masks").mkdir()
    (source / "more").mkdir()
    noise(2).save(source / "more/c.jpg")
    (source / "more/masks").mkdir()
    for path, grey in (("masks/a.png", 10), ("more/masks/C.webp", 30), ("masks/nobody.png", 50)):
        Image.new("L", (64, 48), grey).save(source / path, lossless=True)
    report = run(source, tmp_path / "run")
    assert [item.name for item in report.items] == ["a", "b", "c"]
    found = {name: mask_of(report, name, tmp_path / "run") for name in "abc"}
    assert found["a"] is not None
    assert found["a"].max() == found["a"].min() == 10
    assert found["c"] is not None
    assert abs(int(found["c"][0, 0]) - 30) <= 1
    assert found["b"] is None
    assert [(skip.file, "belongs to no picture" in skip.reason) for skip in report.skipped] == [
        ("masks/nobody.png", True)
    ]


def test_a_folder_of_masks_is_left_alone_when_masks_are_off(source: Path, tmp_path: Path) -> None:
    (source / "masks").mkdir()
    Image.new("L", (64, 48), 9).save(source / "masks/a.png")
    noise(7).save(source / "masks/venice.png")  # of carnival, perhaps
    report = run(source, tmp_path / "run", masks=False)
    assert [(item.source, item.mask) for item in report.items] == [
        ("a.png", None),
        ("b.png", None),
        ("masks/venice.png", None),
    ]


def test_transparency_is_a_mask(source: Path, tmp_path: Path) -> None:
    cut = noise(3).convert("RGBA")
    alpha = np.zeros((48, 64), np.uint8)
    alpha[10:20, 30:50], alpha[0, 0] = 255, 77
    cut.putalpha(Image.fromarray(alpha))
    cut.save(source / "cut.png")
    cut.convert("P").save(source / "palette.gif", transparency=0)
    opaque = noise(4).convert("RGBA")
    opaque.save(source / "opaque.png")
    report = run(source, tmp_path / "run")
    np.testing.assert_array_equal(mask_of(report, "cut", tmp_path / "run"), alpha)  # type: ignore[arg-type]
    assert mask_of(report, "opaque", tmp_path / "run") is None
    assert mask_of(report, "palette", tmp_path / "run") is not None
    without = run(source, tmp_path / "second", mask={"sources": ["alpha", "face"]}, masks=False)
    assert {item.mask for item in without.items} == {None}


def test_transparency_is_turned_upright_with_its_picture(source: Path, tmp_path: Path) -> None:
    cut = noise(3).convert("RGBA")
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, :5] = 255  # the left edge; the camera lay on its side
    cut.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[0x0112] = 6
    cut.save(source / "cut.png", exif=exif)
    mask = mask_of(run(source, tmp_path / "run"), "cut", tmp_path / "run")
    assert mask is not None
    assert mask.shape == (64, 48)
    assert (int(mask[:5].min()), int(mask[5:].max())) == (255, 0)


@pytest.mark.parametrize(
    ("order", "value"), [(("sidecar", "folder", "alpha"), 10), (("folder", "alpha"), 20), (("alpha", "sidecar"), 30)]
)
def test_the_first_source_that_has_one_counts(order: tuple[str, ...], value: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "masks").mkdir(parents=True)
    for i, name in enumerate("ab"):
        picture = noise(i).convert("RGBA")
        picture.putalpha(30)
        picture.save(source / f"{name}.png")
        Image.new("L", (64, 48), 10).save(source / f"{name}.mask.png")
        Image.new("L", (64, 48), 20).save(source / f"masks/{name}.png")
    report = run(source, tmp_path / "run", mask={"sources": order})
    mask = mask_of(report, "a", tmp_path / "run")
    assert mask is not None
    assert set(np.unique(mask)) == {value}


def test_a_mask_that_cannot_be_used_is_named(source: Path, tmp_path: Path) -> None:
    noise(2).save(source / "c.png")
    (source / "masks").mkdir()
    Image.new("L", (64, 48), 9).save(source / "masks/a.png")
    Image.new("L", (48, 48), 9).save(source / "masks/b.png")
    report = run(source, tmp_path / "run")
    assert [(skip.file, "its mask is 48 x 48 pixels" in skip.reason) for skip in report.skipped] == [("b.png", True)]


def test_a_picture_without_a_mask_is_named(source: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 48), 200).save(source / "a.mask.png")
    report = run(source, tmp_path / "run")
    assert report.notes == ("b.png: no mask was found by sidecar, folder, alpha, so the whole picture counts",)


def test_a_mask_is_feathered_and_the_file_stays_as_it_was(source: Path, tmp_path: Path) -> None:
    hard = np.zeros((48, 64), np.uint8)
    hard[:, 32:] = 255
    Image.fromarray(hard).save(source / "a.mask.png")
    before = (source / "a.mask.png").read_bytes()
    mask = mask_of(run(source, tmp_path / "run", mask={"feather": 0.25}), "a", tmp_path / "run")
    assert mask is not None
    row = mask[24].astype(int)
    assert bool((np.diff(row) >= 0).all())
    assert (row[0], row[-1]) == (0, 255)
    wide = np.count_nonzero((row > 0.16 * 255) & (row < 0.84 * 255))
    assert 10 <= wide <= 14, "a quarter of 48 pixels"
    assert (source / "a.mask.png").read_bytes() == before
    again = mask_of(run(source, tmp_path / "run", mask={"feather": 0.25}), "a", tmp_path / "run")
    np.testing.assert_array_equal(again, mask)  # type: ignore[arg-type]


# --- by face


def draw_face(size: int = 160, at: tuple[int, int] = (80, 80), scale: float = 1.0) -> Image.Image:
    """Light skin, dark eyes under brows, a shaded nose, a mouth, hair: what the cascade was taught to see."""
    image = Image.new("RGB", (size, size), (150, 160, 170))
    draw = ImageDraw.Draw(image)

    def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        cx, cy = at[0] + x * scale, at[1] + y * scale
        return cx - w * scale, cy - h * scale, cx + w * scale, cy + h * scale

    draw.ellipse(box(0, -6, 44, 58), fill=(60, 40, 30))
    draw.ellipse(box(0, 4, 38, 48), fill=(225, 190, 165))
    for side in (-1, 1):
        draw.rectangle(box(15 * side, -14, 10, 2), fill=(70, 45, 35))
        draw.ellipse(box(15 * side, -5, 9, 5), fill=(120, 85, 75))
        draw.ellipse(box(15 * side, -5, 4, 4), fill=(20, 20, 20))
    draw.polygon([box(0, -2, 0, 0)[:2], box(-7, 16, 0, 0)[:2], box(7, 16, 0, 0)[:2]], fill=(200, 160, 138))
    draw.ellipse(box(0, 29, 14, 4), fill=(150, 70, 70))
    return image


def test_a_face_is_found_where_it_is(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    source = tmp_path / "source"
    source.mkdir()
    draw_face(240, (80, 90)).save(source / "left.png")
    draw_face(1400, (960, 1000), 4.0).save(source / "large.png")
    noise(5, (160, 160)).save(source / "nobody.png")
    report = run(source, tmp_path / "run", mask={"sources": ["sidecar", "face"]})
    for name, (x, y), scale in (("left", (80, 90), 1.0), ("large", (960, 1000), 4.0)):
        mask = mask_of(report, name, tmp_path / "run")
        assert mask is not None, name
        rows, columns = np.nonzero(mask)
        assert abs(columns.mean() - x) < 12 * scale
        assert abs(rows.mean() - y) < 16 * scale
        assert mask[round(y), round(x)] == 255
        assert mask[2, 2] == 0
        assert 1 < np.count_nonzero(mask) / (np.pi * 44 * 58 * scale**2) < 2, "hair and all, not much more"
    assert mask_of(report, "nobody", tmp_path / "run") is None
    assert [note for note in report.notes if note.startswith("nobody.png: no mask was found by sidecar, face")]


def test_a_mask_of_the_source_comes_before_the_face(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    source = tmp_path / "source"
    source.mkdir()
    draw_face().save(source / "a.png")
    draw_face(200, (100, 100)).save(source / "b.png")
    Image.new("L", (160, 160), 99).save(source / "a.mask.png")
    report = run(source, tmp_path / "run", mask={"sources": ["sidecar", "face"]})
    a, b = mask_of(report, "a", tmp_path / "run"), mask_of(report, "b", tmp_path / "run")
    assert a is not None
    assert b is not None
    assert (set(np.unique(a)), set(np.unique(b))) == ({99}, {0, 255})


def test_without_opencv_it_is_said_what_to_install(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(PreprocessError, match=r"needs OpenCV: pip install 'opencv-python-headless>=4\.14,<5'"):
        run(source, tmp_path / "run", mask={"sources": ["face"]})


# --- by text


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIPSeg of the real classes, a few ten thousand parameters."""
    folder = tmp_path_factory.mktemp("clipseg")
    tokenizer = make_tokenizer()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = CLIPSegConfig(
        text_config=text_config(tokenizer),
        vision_config=vision,
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        conditional_layer=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPSegForImageSegmentation(config)
    model.save_pretrained(folder)
    images = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    CLIPSegProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def likely(clipseg: Path, picture: Image.Image, text: str) -> np.ndarray[Any, Any]:
    """The reference: the model asked by hand for one picture."""
    processor: Any = CLIPSegProcessor.from_pretrained(clipseg)
    model: Any = CLIPSegForImageSegmentation.from_pretrained(clipseg).eval()
    with torch.no_grad():
        logits = model(**processor(text=[text], images=[picture], padding=True, return_tensors="pt")).logits
    whole = torch.sigmoid(logits.reshape(1, 1, *logits.shape[-2:]))
    size = picture.size[::-1]
    return torch.nn.functional.interpolate(whole, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def test_a_text_masks_what_the_model_says(source: Path, clipseg: Path, tmp_path: Path) -> None:
    noise(2, (50, 90)).save(source / "c.png")
    pictures = {name: Image.open(source / f"{name}.png").convert("RGB") for name in "abc"}
    maps = {name: likely(clipseg, picture, "a red star") for name, picture in pictures.items()}
    threshold = round(float(np.median(maps["a"])), 4)
    options = {"sources": ["text"], "text": "a red star", "base": str(clipseg), "threshold": threshold, "batch_size": 2}
    report = run(source, tmp_path / "run", mask=options)
    for name, expected in maps.items():
        mask = mask_of(report, name, tmp_path / "run")
        if mask is None:
            assert expected.max() < threshold + 1e-3
            continue
        sure = np.abs(expected - threshold) > 2e-3
        assert sure.mean() > 0.5
        np.testing.assert_array_equal((mask == 255)[sure], (expected > threshold)[sure])


def test_where_nothing_is_sure_enough_there_is_no_mask(source: Path, clipseg: Path, tmp_path: Path) -> None:
    options = {"sources": ["sidecar", "text"], "text": "a star", "base": str(clipseg), "threshold": 0.999}
    Image.new("L", (64, 48), 200).save(source / "a.mask.png")
    report = run(source, tmp_path / "run", mask=options)
    assert [item.mask is None for item in report.items] == [False, True]
    assert [note for note in report.notes if note.startswith("b.png: no mask was found by sidecar, text")]
    with pytest.raises(PreprocessError, match=r"no picture of data\.source has a mask by text"):
        run(source, tmp_path / "none", mask={**options, "sources": ["text"]})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"base": "nobody/nothing"}, "no folder; if it is a hub id, say which version"),
        ({"base": "EMPTY"}, "cannot be loaded as a CLIPSeg model"),
        ({"base": "NO TOKENIZER"}, "tokenizer"),
    ],
)
def test_a_model_that_is_none_is_refused(
    options: dict[str, str], sentence: str, source: Path, clipseg: Path, tmp_path: Path
) -> None:
    for name in ("EMPTY", "NO TOKENIZER"):
        (tmp_path / name).mkdir()
    for file in clipseg.iterdir():
        if "token" not in file.name:
            (tmp_path / "NO TOKENIZER" / file.name).write_bytes(file.read_bytes())
    base = options["base"] if "/" in options["base"] else str(tmp_path / options["base"])
    with pytest.raises(PreprocessError, match=sentence):
        run(source, tmp_path / "run", mask={"sources": ["text"], "text": "a star", "base": base})


# --- the stage


def test_a_masker_is_asked_once_for_each_picture(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(maskers.MASKERS, "half", f"{__name__}:Half")
    Half.asked = []
    options = {"sources": ["half"], "batch_size": 1}
    first = run(source, tmp_path / "run", mask=options)
    rows = (tmp_path / "run/dataset.jsonl").read_bytes()
    assert Half.asked == [(64, 48), (64, 48)]
    assert [item.mask is None for item in first.items] == [False, True]
    run(source, tmp_path / "run", mask=options)
    assert len(Half.asked) == 2, "a hit and a miss are both kept"
    assert (tmp_path / "run/dataset.jsonl").read_bytes() == rows
    run(source, tmp_path / "run", mask={**options, "threshold": 0.7})
    assert len(Half.asked) == 4, "other parameters, other masks"
    noise(9).save(source / "b.png")
    run(source, tmp_path / "run", mask=options)
    assert len(Half.asked) == 5, "another picture is looked at, and only that"


class Half:
    """Finds the left half of the first picture that it is shown."""

    asked: list[tuple[int, int]]
    version = 1

    def __init__(self, options: MaskArgs) -> None:
        self._threshold = options.threshold

    def parameters(self) -> dict[str, float]:
        return {"threshold": self._threshold}

    @contextmanager
    def loaded(self) -> Generator[maskers.Find]:
        yield self.find

    def find(self, pictures: Sequence[Image.Image]) -> list[Image.Image | None]:
        found: list[Image.Image | None] = []
        for picture in pictures:
            mask = Image.new("L", picture.size)
            mask.paste(255, (0, 0, picture.width // 2, picture.height))
            found.append(mask if len(self.asked) % 2 == 0 else None)
            self.asked.append(picture.size)
        return found


def test_finished_masks_are_made_once(source: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 48), 200).save(source / "a.mask.png")
    made: list[int] = []
    for feather in (0.1, 0.1, 0.2):
        report = run(source, tmp_path / "run", mask={"feather": feather})
        (mask,) = [item.mask for item in report.items if item.mask]
        made.append((tmp_path / "run" / mask).stat().st_mtime_ns)
    assert made[0] == made[1] < made[2]


def test_an_unknown_source_is_answered_with_the_nearest(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PartError, match=r"data.mask.sources 'fase' is unknown; did you mean face"):
        run(source, tmp_path / "run", mask={"sources": ["fase"]})


@pytest.mark.parametrize("words", [["alpha,face"], ["alpha", "face"], ["alpha, face"], ['["alpha", "face"]']])
def test_sources_on_the_command_line(words: list[str]) -> None:
    flags = [text for word in words for text in ("--data.mask.sources", word)]
    args = cli.parse(["--data.source=x", "--data.masks", *flags]).args
    assert args is not None
    assert args.data.mask.sources == ("alpha", "face")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask": {"sources": ["text"]}}, "needs text"),
        ({"mask": {"sources": ["text"], "text": "a hat"}}, "and base"),
        ({"mask": {"text": "a hat"}}, "sources does not name text"),
        ({"masks": False, "mask": {"sources": ["text"], "text": "x", "base": "y"}}, "data.masks is off"),
        ({"mask": {"sources": []}}, "at least 1"),
    ],
)
def test_options_that_contradict_one_another(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DataArgs.model_validate({"source": "", "masks": True, **options})


def test_the_manifest_names_the_mask(source: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 48), 200).save(source / "a.mask.png")
    run(source, tmp_path / "run", mask={"feather": 0.1})
    rows = [json.loads(line) for line in (tmp_path / "run/dataset.jsonl").read_text().splitlines()]
    assert [row["mask"] for row in rows] == ["cache/pictures/a.soft.mask.png", None]
