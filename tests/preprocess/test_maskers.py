"""Maskers by model and without one: what they mark is what the model says, in the pictures' own pixels."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pydantic import ValidationError
from seeing import LABELS, MEAN, STD, mask2former, segformer, yolos
from test_masks import mask_of, noise, run
from transformers import (
    Mask2FormerForUniversalSegmentation,
    SegformerForSemanticSegmentation,
    YolosForObjectDetection,
)

from preprocess import PreprocessError, maskers, weights
from testbed import pictures
from trainer.args import DataArgs, TrainArgs
from trainer.registry import PartError
from trainer.run import opened

Any2 = np.ndarray[Any, Any]
SIZES = {"a": (64, 48), "b": (50, 90), "c": (128, 128)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coarse noise, so that a shrunk picture is still a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate(SIZES.items()):
        noise(seed, (6, 6)).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return yolos(tmp_path_factory.mktemp("yolos"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segformer(tmp_path_factory.mktemp("segformer"))


def pixels(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """[1, 3, h, w] as the processors make it, by hand."""
    with Image.open(path) as picture:
        small = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR), np.float32) / 255
    return torch.from_numpy(((small - MEAN) / STD).astype(np.float32)).permute(2, 0, 1)[None]


def sized(size: tuple[int, int], longest: int = 64) -> tuple[int, int]:
    """How YOLOS fits a picture: its longer side at most `longest`, both sides multiples of 16."""
    scale = longest / max(size)
    return tuple(int(side * scale) // 16 * 16 for side in size)  # type: ignore[return-value]


def boxes(detector: Path, path: Path) -> list[tuple[str, float, tuple[float, float, float, float]]]:
    """The reference: (label, how sure, left top right bottom in pixels), most sure first."""
    model: Any = YolosForObjectDetection.from_pretrained(detector).eval()
    with Image.open(path) as picture:
        width, height = picture.size
    with torch.no_grad():
        out = model(pixels(path, sized((width, height))))
    found: list[tuple[str, float, tuple[float, float, float, float]]] = []
    for logits, (cx, cy, w, h) in zip(out.logits[0], out.pred_boxes[0].tolist(), strict=True):
        likely = logits.softmax(-1)[:-1]  # the last is nothing at all
        corners = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
        found.append((LABELS[int(likely.argmax())], float(likely.max()), corners))
    return sorted(found, key=lambda box: -box[1])


def test_a_detector_masks_the_boxes_of_its_label(detector: Path, photos: Path, tmp_path: Path) -> None:
    label = mode(box[0] for box in boxes(detector, photos / "a.png"))
    sure = sorted(box[1] for name in SIZES for box in boxes(detector, photos / f"{name}.png") if box[0] == label)
    threshold = (sure[len(sure) // 2] + sure[len(sure) // 2 - 1]) / 2
    model = {"base": str(detector), "labels": [label.upper()], "threshold": threshold, "shape": "box", "grow": 1.0}
    report = run(photos, tmp_path / "run", mask={"sources": ["detect"], "detect": model})
    compared = 0
    for name, size in SIZES.items():
        expected = Image.new("L", size)
        wanted = [box[2] for box in boxes(detector, photos / f"{name}.png") if box[0] == label and box[1] > threshold]
        for corners in wanted:
            ImageDraw.Draw(expected).rectangle(corners, fill=255)
        mask = mask_of(report, name, tmp_path / "run")
        if mask is None:
            assert expected.getbbox() is None, name
            assert any(note.startswith(f"{name}.png: no mask was found by detect") for note in report.notes)
            continue
        compared += len({box[0] for box in boxes(detector, photos / f"{name}.png") if box[1] > threshold}) > 1
        assert np.mean(mask == np.asarray(expected)) > 0.97, name
    assert compared, "boxes of other labels are sure enough too"


def test_an_ellipse_stands_in_the_box_and_grows(detector: Path, photos: Path, tmp_path: Path) -> None:
    masks: dict[str, Any2] = {}
    label = boxes(detector, photos / "c.png")[0][0]
    for name, options in {"box": {"shape": "box"}, "ellipse": {}, "grown": {"grow": 2.0}}.items():
        model = {"base": str(detector), "labels": [label], "threshold": 0.01, "grow": 1.0, **options}
        report = run(photos, tmp_path / name, mask={"sources": ["detect"], "detect": model})
        mask = mask_of(report, "c", tmp_path / name)
        assert mask is not None
        masks[name] = mask > 0
    assert 0.4 < masks["ellipse"].sum() / masks["box"].sum() < 0.95
    assert not np.any(masks["ellipse"] & ~masks["box"])
    assert masks["grown"].sum() > masks["ellipse"].sum()
    assert not np.any(masks["ellipse"] & ~masks["grown"])


@pytest.mark.parametrize("kind", ["segformer", "mask2former"])
def test_a_person_is_what_the_model_says(kind: str, photos: Path, segmenter: Path, tmp_path: Path) -> None:
    base = segmenter if kind == "segformer" else mask2former(tmp_path / "model")
    expected = {name: segments(kind, base, photos / f"{name}.png", size) for name, size in SIZES.items()}
    label = LABELS[int(np.bincount(expected["c"].ravel()).argmax())]
    number = next(n for n, name in LABELS.items() if name == label)
    options = {"sources": ["person"], "person": {"base": str(base), "labels": [label]}}
    report = run(photos, tmp_path / "run", mask=options)
    for name in SIZES:
        mask = mask_of(report, name, tmp_path / "run")
        there = expected[name] == number
        assert (mask is not None) == bool(there.any())
        if mask is not None:
            assert np.mean((mask == 255) == there) > 0.98, name
    assert len(set(np.unique(expected["c"]))) > 1, "or any mask would do"


def segments(kind: str, base: Path, path: Path, size: tuple[int, int]) -> Any2:
    """The reference: the number of the likeliest label of each pixel."""
    shape = size[::-1]
    with torch.no_grad():
        if kind == "segformer":
            model: Any = SegformerForSemanticSegmentation.from_pretrained(base).eval()
            scores = model(pixels(path, (64, 64))).logits
        else:
            model = Mask2FormerForUniversalSegmentation.from_pretrained(base).eval()
            out = model(pixels(path, (64, 64)))
            where = torch.nn.functional.interpolate(out.masks_queries_logits, (384, 384), mode="bilinear").sigmoid()
            scores = torch.einsum("bqc,bqhw->bchw", out.class_queries_logits.softmax(-1)[..., :-1], where)
    large = torch.nn.functional.interpolate(scores, shape, mode="bilinear", align_corners=False)
    return large[0].argmax(0).numpy()


def test_an_unknown_label_is_answered_with_what_the_model_knows(
    detector: Path, segmenter: Path, photos: Path, tmp_path: Path
) -> None:
    detect = {"sources": ["detect"], "detect": {"base": str(detector), "labels": ["persn"]}}
    with pytest.raises(PreprocessError, match=r"'persn', which the model does not know; did you mean person\?") as said:
        run(photos, tmp_path / "run", mask=detect)
    assert "(dog, person, wall)" in str(said.value)
    with pytest.raises(PreprocessError, match=r"data\.mask\.person\.labels names 'hat'"):
        run(
            photos,
            tmp_path / "run",
            mask={"sources": ["person"], "person": {"base": str(segmenter), "labels": ["hat"]}},
        )


def test_another_kind_of_model_is_refused(detector: Path, segmenter: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=r"of type 'yolos', and person needs a semantic"):
        run(photos, tmp_path / "run", mask={"sources": ["person"], "person": {"base": str(detector)}})
    with pytest.raises(PreprocessError, match=r"data\.mask\.detect\.base .* cannot be loaded as an object detector"):
        run(
            photos,
            tmp_path / "run",
            mask={"sources": ["detect"], "detect": {"base": str(segmenter), "labels": ["dog"]}},
        )
    with pytest.raises(PreprocessError, match=r"set data\.mask\.detect\.revision to a commit"):
        run(
            photos,
            tmp_path / "run",
            mask={"sources": ["detect"], "detect": {"base": "some/model", "labels": ["dog"]}},
        )


def test_several_are_asked_in_their_order_and_each_for_itself(
    detector: Path, segmenter: Path, photos: Path, tmp_path: Path
) -> None:
    """detect misses what is below its threshold; person fills in. A threshold makes only detect's masks anew."""
    best = {name: boxes(detector, photos / f"{name}.png") for name in SIZES}
    label = best["a"][0][0]
    sure = {name: max((box[1] for box in found if box[0] == label), default=0.0) for name, found in best.items()}
    low, high = sorted(sure.values())[:2]
    threshold = (low + high) / 2
    detect = {"base": str(detector), "labels": [label], "threshold": threshold}
    person = {"base": str(segmenter), "labels": list(LABELS.values())}
    options = {"sources": ["detect", "person"], "detect": detect, "person": person}
    report = run(photos, tmp_path / "run", mask=options)
    assert all(item.mask for item in report.items)
    whole = {name for name in SIZES if np.all(mask_of(report, name, tmp_path / "run") == 255)}
    assert whole == {min(sure, key=lambda name: sure[name])}, "person, with every label, fills the picture"

    kept = tmp_path / "run/cache/masks"
    first = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert len(first) == 4, "three by detect, one by person"
    run(photos, tmp_path / "run", mask={**options, "detect": {**detect, "threshold": threshold * 0.99}})
    second = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert first.items() <= second.items()
    assert len(second) in (7, 6), "detect looked again, and person at most at what it had seen"


def test_a_changed_model_is_asked_again(photos: Path, tmp_path: Path) -> None:
    options = {"sources": ["person"], "person": {"base": str(tmp_path / "model"), "labels": list(LABELS.values())}}
    segformer(tmp_path / "model")
    run(photos, tmp_path / "run", mask=options)
    config = tmp_path / "model/config.json"
    config.write_text(config.read_text().replace('"dog"', '"cat"'))
    with pytest.raises(PreprocessError, match="names 'dog'"):
        run(photos, tmp_path / "run", mask=options)


def test_a_model_holds_no_memory_after_its_stage(
    detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    devices: set[str] = set()
    real = weights.on_device

    @contextmanager
    def watched(option: str, model: Any, wanted: str) -> Generator[Any]:
        loaded.extend(weakref.ref(weight) for weight in model.parameters())
        with real(option, model, wanted) as placed:
            devices.update(weight.device.type for weight in placed.parameters())
            yield placed

    monkeypatch.setattr(weights, "on_device", watched)
    detect = {"base": str(detector), "labels": ["dog"], "threshold": 0.001}
    run(photos, tmp_path / "run", mask={"sources": ["detect"], "detect": {**detect}, "device": "cpu"})
    gc.collect()
    assert (len(loaded) > 10, devices) == (True, {"cpu"})
    assert not [one for one in loaded if (weight := one()) is not None and not weight.is_meta]


# --- without a model


def test_the_foreground_is_found(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    source = tmp_path / "source"
    source.mkdir()
    shapes = {}
    for seed in range(30):
        picture, silhouette = scene(seed)
        picture.save(source / f"{seed}.png")
        shapes[f"{seed}"] = silhouette
    Image.new("RGB", (64, 64), "green").save(source / "empty.png")
    report = run(source, tmp_path / "run", mask={"sources": ["foreground"]})
    overlaps = {name: overlap(mask_of(report, name, tmp_path / "run"), shape) for name, shape in shapes.items()}
    assert np.mean(list(overlaps.values())) > 0.9, overlaps
    assert np.median(list(overlaps.values())) > 0.95
    assert mask_of(report, "empty", tmp_path / "run") is None
    assert any(note.startswith("empty.png: no mask was found by foreground") for note in report.notes)
    for path in source.glob("[3-9]*.png"):
        path.unlink()
    again = run(source, tmp_path / "again", mask={"sources": ["foreground"]})
    for item in again.items:
        np.testing.assert_array_equal(  # it draws nothing at random
            mask_of(report, item.name, tmp_path / "run"), mask_of(again, item.name, tmp_path / "again")
        )


def scene(seed: int, side: int = 96) -> tuple[Image.Image, Any2]:
    """One of the testbed's pictures, and where its shapes are. Outlines are left out: what is in them is background."""
    rng = np.random.default_rng(seed)
    drawn = pictures.draw_scene(rng, fills=tuple(fill for fill in pictures.FILLS if fill != "outline"))
    state = rng.bit_generator.state
    picture = pictures.render(drawn, rng, side, side)
    both: list[Any2] = []
    for colour in ("black", "white"):
        painted = replace(drawn, things=tuple(replace(thing, colour=colour, fill="flat") for thing in drawn.things))
        rng.bit_generator.state = state
        both.append(np.asarray(pictures.render(painted, rng, side, side), np.int64))
    return picture, np.abs(both[1] - both[0]).sum(axis=2) > 300


def overlap(mask: Any2 | None, shape: Any2) -> float:
    hit = np.zeros_like(shape) if mask is None else mask > 127
    return float((hit & shape).sum() / (hit | shape).sum())


# --- the options


@pytest.mark.parametrize("sources", [["sidecar"], ["half.py:Left"]])
@pytest.mark.parametrize("feather", [0.0, 0.2])
def test_what_was_found_counts_least_when_inverted(
    sources: list[str], feather: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own_masker(tmp_path / "half.py")
    source = tmp_path / "source"
    source.mkdir()
    for seed, name in enumerate("ab"):
        noise(seed).save(source / f"{name}.png")
    grey = np.zeros((48, 64), np.uint8)
    grey[:, :32] = 255
    Image.fromarray(grey).save(source / "a.mask.png")
    for invert in (False, True):
        mask = mask_of(
            run(source, tmp_path / f"{invert}", mask={"sources": sources, "feather": feather, "invert": invert}),
            "a",
            tmp_path / f"{invert}",
        )
        assert mask is not None
        assert (mask[0, 0] > 127, mask[0, -1] > 127) == (not invert, invert)
        assert (len(np.unique(mask)) > 2) == bool(feather)
    if sources == ["sidecar"]:
        report = run(source, tmp_path / "True", mask={"sources": sources, "invert": True})
        assert mask_of(report, "b", tmp_path / "True") is None, "with nothing found, all counts"


OWN = """
from contextlib import contextmanager
from PIL import Image

class Left:
    version = 1
    def __init__(self, options):
        pass
    def parameters(self):
        return {}
    @contextmanager
    def loaded(self):
        def find(pictures):
            masks = []
            for picture in pictures:
                mask = Image.new("L", picture.size)
                mask.paste(255, (0, 0, picture.width // 2, picture.height))
                masks.append(mask)
            return masks
        yield find
"""


def own_masker(path: Path, text: str = OWN) -> str:
    path.write_text(text, encoding="utf-8")
    return f"{path}:Left"


def test_a_masker_of_ones_own_is_asked_again_when_its_file_changes(photos: Path, tmp_path: Path) -> None:
    spec = own_masker(tmp_path / "half.py")
    mask = mask_of(run(photos, tmp_path / "run", mask={"sources": [spec]}), "c", tmp_path / "run")
    assert mask is not None
    assert (mask[0, 63], mask[0, 64]) == (255, 0)
    own_masker(tmp_path / "half.py", OWN.replace("// 2", "// 4"))
    mask = mask_of(run(photos, tmp_path / "run", mask={"sources": [spec]}), "c", tmp_path / "run")
    assert mask is not None
    assert (mask[0, 31], mask[0, 32]) == (255, 0)
    own_masker(tmp_path / "half.py", OWN.replace('Image.new("L", picture.size)', 'Image.new("L", (8, 8))'))
    with pytest.raises(PreprocessError, match=r"made a mask of 8 x 8 pixels for a picture of 64 x 48"):
        run(photos, tmp_path / "run", mask={"sources": [spec]})


@pytest.mark.parametrize(
    ("source", "code", "sentence"),
    [
        ("fase", True, r"data\.mask\.sources 'fase' is unknown; did you mean face\?"),
        ("sidcar", True, "did you mean sidecar"),
        ("nowhere.py:Left", True, "there is no file 'nowhere.py'"),
        ("pathlib:Path", True, "is no masker: it has no version, parameters, loaded"),
        ("pathlib:Path", False, "would import code, which is refused here"),
    ],
)
@pytest.mark.parametrize("option", ["mask", "upscale"])
def test_a_wrong_part_is_refused_before_anything_is_loaded(
    option: str, source: str, code: bool, sentence: str, tmp_path: Path
) -> None:
    """There is no base, which would be an error of its own."""
    if option == "upscale":
        if source in ("fase", "sidcar"):
            source, sentence = "swin2", r"data\.upscale\.by 'swin2' is unknown; did you mean swin2sr\?"
        sentence = sentence.replace("masker", "upscaler")
    chosen = {"masks": True, "mask": {"sources": [source]}} if option == "mask" else {"upscale": {"by": source}}
    base, runtime = {"base": str(tmp_path / "none")}, {"out": str(tmp_path)}
    args = TrainArgs.model_validate({"data": {"source": "x", **chosen}, "model": base, "runtime": runtime})
    with pytest.raises(PartError, match=sentence), opened(args, code=code):
        pass


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        ({"sources": ["detect"]}, r"needs detect\.base"),
        ({"sources": ["detect"], "detect": {"base": "x"}}, r"and detect\.labels"),
        ({"sources": ["person"]}, r"needs person\.base"),
        ({"person": {"base": "x"}}, "sources does not name person"),
        ({"detect": {"threshold": 0.4}}, "sources does not name detect"),
    ],
)
def test_options_that_contradict_one_another(mask: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DataArgs.model_validate({"source": "", "masks": True, "mask": mask})


def test_every_masker_can_be_loaded_by_name() -> None:
    assert {name: maskers.kind(name) is not None for name in maskers.MASKERS} == dict.fromkeys(maskers.MASKERS, True)
    assert maskers.kind("alpha") is None
