"""The dataset: pure, fair to every picture, and true to the pixels."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from small import items, latents

from trainer.dataset import Dataset, DatasetError, Item, Tags, forms, load_mask, load_pixels, read_manifest
from trainer.types import Samples
from trainer.view import PLAIN, Augment, label, sizes

MIXED = [(32, 32)] * 5 + [(48, 24)] * 3 + [(24, 48)]


def dataset(sizes: list[tuple[int, int]] = MIXED, **options: Any) -> Dataset:
    pictures = items(sizes)
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "latents": latents(pictures), **options}
    return Dataset(pictures, **settings)


def equal(a: Samples, b: Samples) -> bool:
    return torch.equal(a.latents, b.latents) and (a.captions, a.names) == (b.captions, b.names)


def test_an_index_gives_the_same_batch_for_ever_and_in_any_order() -> None:
    pictures = items(MIXED)
    both = {f"{name}{end}": latent for name, latent in latents(pictures).items() for end in ("", ".mirrored")}
    options: dict[str, Any] = {"caption_dropout": 0.3, "flip": {item.name for item in pictures}, "latents": both}
    forward = [dataset(**options).micro(i) for i in range(40)]
    other = dataset(**options)
    for i in [39, 0, 17, 17, 3, 38, 1]:
        torch.manual_seed(i)
        assert equal(other.micro(i), forward[i])
    assert not all(equal(dataset(**options, **{"seed": 1}).micro(i), forward[i]) for i in range(5))


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    dataset(caption_dropout=0.5).micro(7)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_full_and_never_mix_buckets() -> None:
    bucket = {item.name: item.bucket for item in items(MIXED)}
    data = dataset()
    for i in range(40):
        samples = data.micro(i)
        (width, height), *others = {bucket[name] for name in samples.names}
        assert not others
        assert samples.latents.shape == (4, 2, height // 8, width // 8)
        assert len(samples.captions) == len(samples.names) == 4


def test_every_picture_is_seen_equally_often() -> None:
    data = dataset()
    seen = Counter(name for i in range(2 * len(MIXED)) for name in data.micro(i).names)
    assert seen == {f"p{i}": 8 for i in range(9)}  # two rounds of four epochs


def test_an_epoch_shows_every_picture_once_and_the_next_in_another_order() -> None:
    data = dataset([(32, 32)] * 8)
    epochs = [data.micro(2 * e).names + data.micro(2 * e + 1).names for e in range(12)]
    assert all(sorted(epoch) == sorted(f"p{i}" for i in range(8)) for epoch in epochs)
    assert len(set(epochs)) == 12


def test_each_round_mixes_its_buckets_anew() -> None:
    data, bucket = dataset(), {item.name: item.bucket for item in items(MIXED)}
    rounds = {tuple(bucket[data.micro(9 * r + i).names[0]] for i in range(9)) for r in range(6)}
    assert len(rounds) > 1
    assert {tuple(sorted(order)) for order in rounds} == {tuple(sorted(MIXED))}


def test_latents_go_with_their_names() -> None:
    store = latents(items(MIXED))
    for i in range(9):
        samples = dataset().micro(i)
        for latent, name in zip(samples.latents, samples.names, strict=True):
            assert torch.equal(latent, store[name])


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_captions_are_dropped_at_the_asked_rate(rate: float) -> None:
    data = dataset(caption_dropout=rate)
    captions = [caption for i in range(250) for caption in data.micro(i).captions]
    assert captions.count("") / len(captions) == pytest.approx(rate, abs=0.05)
    assert set(captions) - {""} <= {"a TOK", "a red TOK"}


def test_one_of_several_captions_is_drawn_by_index() -> None:
    pictures = [replace(item, captions=("one", "two", "three")) for item in items([(32, 32)] * 2)]
    pictures.append(replace(items([(32, 32)] * 3)[2], captions=()))
    options: dict[str, Any] = {"batch_size": 3, "seed": 0}
    data = Dataset(pictures, latents(pictures), **options)
    shown = [data.micro(i) for i in range(300)]
    drawn = {name: [dict(zip(s.names, s.captions, strict=True))[name] for s in shown] for name in shown[0].names}
    for item in pictures[:2]:
        counts = Counter(drawn[item.name])
        assert set(counts) == {"one", "two", "three"}
        assert all(70 < count < 130 for count in counts.values())
    assert drawn[pictures[0].name] != drawn[pictures[1].name]
    assert set(drawn[pictures[2].name]) == {pictures[2].caption}
    again = Dataset(pictures, latents(pictures), **options)
    assert all(equal(again.micro(i), shown[i]) for i in (299, 0, 150))


def test_varied_captions_come_from_a_few_forms_that_are_the_pictures_own() -> None:
    tags = Tags(keep=1, shuffle=True, dropout=0.3, variants=3)
    parts = "a TOK, " + ", ".join("bcdefghijk")
    pictures = [replace(item, caption=parts, captions=()) for item in items([(32, 32)] * 2)]
    pictures.append(replace(pictures[0], name="p2", sha256="c", captions=("one, two", "three, four, five")))
    options: dict[str, Any] = {"batch_size": 3, "seed": 5, "tags": tags}
    shown = [Dataset(pictures, latents(pictures), **options).micro(i) for i in range(120)]
    drawn = {name: [dict(zip(s.names, s.captions, strict=True))[name] for s in shown] for name in shown[0].names}
    for item in pictures:
        assert set(drawn[item.name]) == set(forms(item, tags, 5))
        assert set(drawn[item.name]) == set(forms(replace(item, name="renamed"), tags, 5))
    counts = Counter(drawn["p0"])
    assert len(counts) == 3
    assert all(20 < count < 60 for count in counts.values())
    assert set(drawn["p0"]) != set(drawn["p1"])
    assert forms(pictures[0], tags, 6) != forms(pictures[0], tags, 5)
    more = forms(pictures[0], replace(tags, variants=5), 5)
    assert more[:3] == forms(pictures[0], tags, 5)
    again = Dataset(pictures, latents(pictures), **options)
    assert all(equal(again.micro(i), shown[i]) for i in (119, 0, 60))


def test_pictures_are_mirrored_half_of_the_time_with_their_masks() -> None:
    pictures = items([(32, 32)] * 4)
    plain = latents(pictures)
    mirrored = {f"{name}.mirrored": latent.flip(-1) for name, latent in plain.items() if name != "p3"}
    masks = {"p0": torch.arange(16.0).reshape(1, 4, 4) / 15}
    data = Dataset(pictures, plain | mirrored, batch_size=4, seed=0, flip={"p0", "p1", "p2"}, masks=masks)
    turned = 0
    for i in range(100):
        samples = data.micro(i)
        assert samples.mask is not None
        for latent, name, mask in zip(samples.latents, samples.names, samples.mask, strict=True):
            is_mirrored = name != "p3" and torch.equal(latent, mirrored[f"{name}.mirrored"])
            assert is_mirrored or torch.equal(latent, plain[name])
            turned += is_mirrored
            expected = masks.get(name, torch.ones(1, 4, 4))
            assert torch.equal(mask, expected.flip(-1) if is_mirrored else expected)
    assert turned / 300 == pytest.approx(0.5, abs=0.08)


def test_each_version_is_shown_as_often_and_with_its_own_mask_and_sizes() -> None:
    pictures, augment = [replace(item, width=80) for item in items([(32, 32)] * 3)], Augment(3, crop=0.2, seed=1)
    flip = {"p0", "p1"}
    versions = {
        label(item.name, v.number, mirrored=v.mirrored): (item, v, torch.full((2, 4, 4), float(n)))
        for n, (item, v) in enumerate(
            (item, v) for item in pictures for v in augment.versions(item, mirrored=item.name in flip)
        )
    }
    masks = {name: torch.rand(1, 4, 4) for name, (_, v, _) in versions.items() if not v.mirrored}
    stored = {name: latent for name, (_, _, latent) in versions.items()}
    data = Dataset(pictures, stored, batch_size=3, seed=0, flip=flip, augment=augment, masks=masks)
    seen: Counter[str] = Counter()
    for i in range(300):
        samples = data.micro(i)
        assert samples.mask is not None
        assert samples.sizes is not None
        for row, latent in enumerate(samples.latents):
            name, (item, version, _) = list(versions.items())[int(latent[0, 0, 0])]
            seen[name] += 1
            mask = masks[label(item.name, version.number)]
            assert item.name == samples.names[row]
            assert torch.equal(samples.mask[row], mask.flip(-1) if version.mirrored else mask)
            assert samples.sizes[row].tolist() == list(sizes(item, version))
    assert seen.keys() == versions.keys()
    for name, count in seen.items():
        assert count == pytest.approx(75 if name.startswith("p2") else 37.5, abs=22), name
    again = Dataset(pictures, stored, batch_size=3, seed=0, flip=flip, augment=augment, masks=masks)
    assert torch.equal(again.micro(200).latents, data.micro(200).latents)


def test_without_masks_there_is_no_mask() -> None:
    assert dataset().micro(0).mask is None


def test_no_pictures_are_refused() -> None:
    with pytest.raises(DatasetError, match="no pictures"):
        dataset([])


def record(**changes: Any) -> str:
    line = {
        "file": "cache/pictures/dog.png",
        "name": "dog",
        "sha256": "00",
        "caption": "a TOK",
        "mask": None,
        "width": 40,
        "height": 30,
        "bucket": [32, 24],
        "stages": {"ingest": 1},
    }
    return json.dumps({**line, **changes})


def line_of(folder: Path, **changes: Any) -> Path:
    (folder / "line.jsonl").write_text(record(**changes))
    return folder / "line.jsonl"


def test_a_manifest_is_read_with_paths_from_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "dataset.jsonl"
    path.write_text(record() + "\n\n" + record(name="cat", file="/far/cat.png", mask="cat.mask.png") + "\n")
    dog, cat = read_manifest(path)
    (both,) = read_manifest(line_of(tmp_path, captions=["a TOK", "TOK"]))
    assert both.captions == ("a TOK", "TOK")
    assert dog == Item(tmp_path / "cache/pictures/dog.png", "dog", "00", "a TOK", None, 40, 30, (32, 24))
    assert (cat.file, cat.mask) == (Path("/far/cat.png"), tmp_path / "cat.mask.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (record() + "\n{", "line 2"),
        (record().replace('"sha256"', '"sha"'), "line 1 .*sha256"),
        (record(bucket=[1, 2, 3]), "line 1"),
        (record() + "\n" + record(), "more than one picture: dog"),
    ],
)
def test_a_bad_manifest_is_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.jsonl").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_manifest(tmp_path / "dataset.jsonl")


def picture(folder: Path, pixels: np.ndarray, bucket: tuple[int, int], mask: np.ndarray | None = None) -> Item:
    Image.fromarray(pixels).save(folder / "p.png")
    if mask is not None:
        Image.fromarray(mask).save(folder / "p.mask.png")
    height, width = pixels.shape[:2]
    where = folder / "p.mask.png" if mask is not None else None
    return Item(folder / "p.png", "p", "0", "a TOK", where, width, height, bucket)


def test_pixels_of_a_picture_of_the_bucket_s_size_are_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    tensor = load_pixels(picture(tmp_path, pixels, (24, 16)))
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_a_wide_picture_is_cropped_evenly_from_both_sides_with_its_mask(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, :16], pixels[:, 16:32], pixels[:, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    mask = np.zeros((16, 48), dtype=np.uint8)
    mask[:8, 16:32], mask[:, :16] = 255, 255  # the left third is cropped away
    item = picture(tmp_path, pixels, (16, 16), mask)
    assert torch.equal(load_pixels(item), torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 16, 16))
    expected = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    mask_read = load_mask(item, 8)
    assert mask_read is not None
    assert torch.equal(mask_read, expected)


def test_a_mask_is_averaged_over_each_latent(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, :2] = 255
    read = load_mask(picture(tmp_path, np.zeros((8, 8, 3), np.uint8), (8, 8), mask), 4)
    assert read is not None
    torch.testing.assert_close(read, torch.tensor([[[0.5, 0.0], [0.5, 0.0]]]))


def test_a_mask_that_the_crop_empties_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = np.zeros((16, 48), dtype=np.uint8)
    mask[:, :8] = 255
    with caplog.at_level(logging.WARNING):
        assert load_mask(picture(tmp_path, np.zeros((16, 48, 3), np.uint8), (16, 16), mask), 8) is None
    assert "mask of p is empty" in caplog.text


def marked(folder: Path) -> Item:
    """A picture that is white where its mask is, so that it can be seen whether they are one."""
    mask = np.zeros((96, 160), dtype=np.uint8)
    mask[30:62, 40:72], mask[60:70, 100:130] = 255, 255
    return picture(folder, np.repeat(mask[:, :, None], 3, axis=2), (64, 64), mask)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_mask_stays_on_its_picture_when_both_are_cropped_and_mirrored(
    number: int, mirrored: bool, tmp_path: Path
) -> None:
    item = marked(tmp_path)
    version = Augment(3, crop=0.2, seed=4).version(item, number, mirrored=mirrored)
    pixels, mask = load_pixels(item, version), load_mask(item, 4, version)
    assert mask is not None
    white = torch.nn.functional.avg_pool2d((pixels[:1] + 1) / 2, 4)
    assert (white - mask).abs().max() < 0.16, "they part"  # edges: one is scaled by lanczos, one bilinearly
    assert (white.flip(-1) - mask).abs().max() > 0.9, "the picture cannot tell"
    if number:
        plain = load_mask(item, 4, PLAIN.version(item, mirrored=mirrored))
        assert plain is not None
        assert (mask - plain).abs().max() > 0.2, "the crop did not move"


def test_colours_change_as_pillow_changes_them_and_the_crop_does_not(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    item = picture(tmp_path, pixels, (24, 16))
    version = Augment(1, colour=0.3).version(item, 1)
    assert version.box == (0.0, 0.0, 24.0, 16.0)
    expected = Image.fromarray(pixels)
    for kind, factor in zip(("Brightness", "Contrast", "Color"), version.colours, strict=True):
        assert 0.7 <= factor <= 1.3
        expected = getattr(ImageEnhance, kind)(expected).enhance(factor)
    read = np.rint((load_pixels(item, version).numpy() + 1) * 127.5).transpose(1, 2, 0)
    np.testing.assert_array_equal(read, np.asarray(expected))
    assert len(set(version.colours)) == 3


def test_a_picture_that_changed_after_preprocessing_is_refused(tmp_path: Path) -> None:
    item = replace(picture(tmp_path, np.zeros((16, 16, 3), np.uint8), (16, 16)), width=32)
    with pytest.raises(DatasetError, match=r"p.png is 16x16 pixels, but dataset.jsonl says 32x16"):
        load_pixels(item)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    item = picture(tmp_path, np.zeros((16, 16, 3), np.uint8), (16, 16), np.zeros((8, 16), np.uint8))
    with pytest.raises(DatasetError, match=r"p.mask.png is 16x8 pixels.*16x16"):
        load_mask(item, 8)
