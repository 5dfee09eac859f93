"""Upscaling: only what is too small, by a real Swin2SR, in tiles that do not show, kept and told."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from seeing import swin2sr, yolos
from test_masks import noise
from transformers import Swin2SRForImageSuperResolution
from transformers.models.swin2sr.image_processing_pil_swin2sr import Swin2SRImageProcessorPil

from preprocess import PreprocessError, Report, build, upscale
from preprocess.upscalers.swin2sr import tiled
from trainer.args import DataArgs
from trainer.dataset import load_mask, load_pixels, read_manifest

Pixels = NDArray[np.float32]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swin2sr(tmp_path_factory.mktemp("swin2sr"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """At 64 pixels large is shrunk, near grows 1.3 times, small 2.7 and tiny 3.2 times."""
    folder = tmp_path / "source"
    folder.mkdir()
    for seed, (name, side) in enumerate({"large": 96, "near": 48, "small": 24, "tiny": 20}.items()):
        noise(seed, (8, 8)).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


def run(source: Path, out: Path, model: Path | None, resolutions: int | list[int] = 64, **options: Any) -> Report:
    upscale = {"upscale": {"by": "swin2sr", "base": str(model), "tile": 32, "overlap": 8}} if model else {}
    data = DataArgs.model_validate({"source": str(source), **upscale, **options})
    return build(str(source), out, data, resolutions, step=16)


def forward(model: Path) -> Callable[[Pixels], Pixels]:
    network: Any = Swin2SRForImageSuperResolution.from_pretrained(model).eval()

    def enlarged(pixels: Pixels) -> Pixels:
        with torch.no_grad():
            batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
            return network(pixel_values=batch).reconstruction[0].permute(1, 2, 0).numpy()

    return enlarged


def test_only_what_is_too_small_is_enlarged(source: Path, model: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    out = tmp_path / "run"
    report = run(source, out, model)
    sizes = {item.name: ((item.width, item.height), item.original) for item in report.items}
    assert sizes == {
        "large": ((96, 96), None),
        "near": ((48, 48), None),
        "small": ((48, 48), (24, 24)),
        "tiny": ((40, 40), (20, 20)),
    }
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert "tiny.png: swin2sr made 40 x 40 pixels of its 20 x 20" in report.notes
    assert not [note for note in report.notes if "look soft" in note]
    rows = [json.loads(line) for line in (out / "dataset.jsonl").read_text().splitlines()]
    assert {row["name"]: row["original"] for row in rows}["small"] == [24, 24]
    assert {row["name"]: row["file"] for row in rows}["small"] == "cache/upscaled/small.png"
    trained = {item.name: load_pixels(item) for item in read_manifest(out / "dataset.jsonl")}
    with Image.open(out / "cache/upscaled/small.png") as picture:
        expected = picture.resize((64, 64), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(
        trained["small"].numpy(), np.asarray(expected, np.float32).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6
    )


def test_it_is_what_the_model_makes_of_the_picture(source: Path, model: Path, tmp_path: Path) -> None:
    """24 pixels are whole windows: with the maker's own processor, which pads one window more, the inside is equal."""
    run(source, tmp_path / "run", model)
    with Image.open(source / "small.png") as picture:
        inputs: Any = Swin2SRImageProcessorPil(size_divisor=4)(picture.convert("RGB"), return_tensors="pt")
    network: Any = Swin2SRForImageSuperResolution.from_pretrained(model).eval()
    with torch.no_grad():
        whole = network(**inputs).reconstruction[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255
    with Image.open(tmp_path / "run/cache/upscaled/small.png") as picture:
        found = np.asarray(picture, np.float32)
    assert found.shape == (48, 48, 3)
    assert whole[:40, :40].std() > 5
    np.testing.assert_allclose(found[:24, :24], whole[:24, :24], atol=1)


def test_it_says_how_far_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upscale, "Progress", partial(upscale.Progress, after_s=1e-9, every_s=0.0))
    (tmp_path / "twice.py").write_text(OWN.replace("FACTOR", "2"), encoding="utf-8")
    caplog.set_level("INFO")
    run(source, tmp_path / "run", None, upscale={"by": f"{tmp_path}/twice.py:Twice"})
    lines = [line.split("  ")[0] for line in caplog.messages if line.startswith("enlarging by")]
    assert lines == [f"enlarging by {tmp_path}/twice.py:Twice {done}/2" for done in (1, 2)]


def test_without_it_they_are_only_named(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "run", None)
    assert {item.original for item in report.items} == {None}
    assert len([note for note in report.notes if "look soft" in note]) == 2
    assert not (tmp_path / "run/cache/upscaled").exists()


def test_the_mask_grows_with_its_picture(source: Path, model: Path, tmp_path: Path) -> None:
    grey = np.zeros((24, 24), np.uint8)
    grey[:, 12:] = 255
    Image.fromarray(grey).save(source / "small.mask.png")
    report = run(source, tmp_path / "run", model, masks=True)
    small = next(item for item in report.items if item.name == "small")
    assert small.mask == "cache/upscaled/small.mask.png"
    with Image.open(tmp_path / "run" / small.mask) as mask:
        assert mask.size == (48, 48)
        assert (np.asarray(mask)[:, :20].max(), np.asarray(mask)[:, 28:].min()) == (0, 255)
    item = next(item for item in read_manifest(tmp_path / "run/dataset.jsonl") if item.name == "small")
    assert load_mask(item, 8) is not None
    with Image.open(source / "small.mask.png") as own:
        assert own.size == (24, 24)


def test_made_up_detail_calls_for_no_larger_bucket(source: Path, model: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "run", model, [48, 64], upscale_limit=1.5)
    buckets = {item.name: (item.bucket[0], item.original) for item in report.items}
    assert buckets["small"] == (48, (24, 24)), "its 48 pixels fill 48, as the 24 that it has do not"
    wide = run(source, tmp_path / "wide", model, [32, 48], upscale_limit=1.2)
    assert {item.name: item.bucket[0] for item in wide.items}["small"] == 32, "though 48 pixels would fill 48"


def test_done_again_it_makes_only_what_is_missing(source: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(source, out, model)
    rows = (out / "dataset.jsonl").read_bytes()
    made = {path: path.stat().st_mtime_ns for path in (out / "cache/upscaled").glob("*.png")}
    assert len(made) == 2
    run(source, out, model)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert (out / "dataset.jsonl").read_bytes() == rows
    (out / "cache/upscaled/tiny.png").unlink()
    (out / "dataset.jsonl").unlink()
    run(source, out, model)
    again = {path.stem: path.stat().st_mtime_ns != time for path, time in made.items()}
    assert again == {"small": False, "tiny": True}
    assert (out / "dataset.jsonl").read_bytes() == rows
    run(source, out, model, upscale={"by": "swin2sr", "base": str(model), "tile": 64, "overlap": 8})
    assert all(path.stat().st_mtime_ns != time for path, time in made.items()), "other tiles, other pictures"


@pytest.mark.parametrize("size", [(200, 144), (181, 61)])
def test_tiles_make_the_same_picture_as_none(model: Path, size: tuple[int, int]) -> None:
    """Two layers with shifted windows see some 12 pixels far, and a quarter of the overlap is 16."""
    picture = np.asarray(noise(1, (9, 7)).resize(size, Image.Resampling.BICUBIC), np.float32) / np.float32(255)
    network = forward(model)
    calls: list[tuple[int, ...]] = []

    def counted(pixels: Pixels) -> Pixels:
        calls.append(pixels.shape)
        return network(pixels)

    whole = tiled(network, picture, 2, 4, 4096, 0)
    parts = tiled(counted, picture, 2, 4, 128, 64)
    assert whole.shape == parts.shape == (2 * size[1], 2 * size[0], 3)
    assert len(calls) > 1
    assert whole.std() > 0.03
    np.testing.assert_allclose(parts, whole, atol=2e-3)
    hard = tiled(network, picture, 2, 4, 32, 0)
    assert np.abs(hard - whole).max() > 5e-3, "without an overlap the tiles show, or this would prove nothing"


@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (32, 16), (48, 0), (33, 7)])
def test_the_shares_of_tiles_add_up(tile: int, overlap: int) -> None:
    """What enlarges by repeating pixels comes out of the tiles as it went in."""
    picture = np.random.default_rng(0).random((75, 101, 3), np.float32)

    def repeat(pixels: Pixels) -> Pixels:
        assert pixels.shape[0] % 4 == pixels.shape[1] % 4 == 0
        assert max(pixels.shape) <= tile
        return pixels.repeat(3, 0).repeat(3, 1)

    np.testing.assert_allclose(
        tiled(repeat, picture, 3, 4, tile, overlap), picture.repeat(3, 0).repeat(3, 1), atol=1e-6
    )


@pytest.mark.parametrize(
    ("upscale", "sentence"),
    [
        ({"base": "x"}, r"upscale\.by is off"),
        ({"by": "swin2sr"}, r"needs upscale\.base"),
        ({"by": "swin2sr", "base": "x", "tile": 64, "overlap": 40}, "more than half of"),
    ],
)
def test_options_that_contradict_one_another(upscale: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DataArgs.model_validate({"source": "", "upscale": upscale})


def test_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=r"data\.upscale\.base .*is no Swin2SR model .* of type 'yolos'"):
        run(source, tmp_path / "run", yolos(tmp_path / "yolos"))
    with pytest.raises(PreprocessError, match=r"set data\.upscale\.revision to a commit or tag"):
        run(source, tmp_path / "run", Path("some/model"))


OWN = """
from contextlib import contextmanager
from PIL import Image

class Twice:
    version = 1
    def __init__(self, options):
        pass
    def parameters(self):
        return {}
    @contextmanager
    def loaded(self):
        yield lambda picture: picture.resize((FACTOR * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
"""


def test_an_upscaler_of_ones_own(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "twice.py"
    file.write_text(OWN.replace("FACTOR", "2"), encoding="utf-8")
    report = run(source, tmp_path / "run", None, upscale={"by": f"{file}:Twice"})
    assert {item.name: item.width for item in report.items} == {"large": 96, "near": 48, "small": 48, "tiny": 40}
    with Image.open(source / "tiny.png") as small, Image.open(tmp_path / "run/cache/upscaled/tiny.png") as large:
        np.testing.assert_array_equal(np.asarray(large)[::2, ::2], np.asarray(small))
    file.write_text(OWN.replace("FACTOR", "3"), encoding="utf-8")
    with pytest.raises(PreprocessError, match="must make both sides larger by the same factor"):
        run(source, tmp_path / "run", None, upscale={"by": f"{file}:Twice"})
