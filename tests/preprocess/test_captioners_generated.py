"""Captioners that write sentences: what each is given and says, and what memory and interruptions do to them."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from captioning import data, item, options
from PIL import Image

from preprocess import PreprocessError, build
from preprocess.captioners import model
from preprocess.captioners.chat import JoyCaption, QwenVL, whole
from preprocess.captioners.generated import Blip, Florence2
from preprocess.captions import captioned

ASKED = (None, "what does the image")

GENERATED = {
    "blip": (Blip, tiny.blip, (None, "a photo of")),
    "florence2": (Florence2, tiny.florence2, (None, "<CAPTION>")),
    "qwen2.5-vl": (QwenVL, tiny.qwen25, ASKED),
    "qwen3-vl": (QwenVL, tiny.qwen3, ASKED),
    "joycaption": (JoyCaption, tiny.joycaption, ASKED),
}

NAMES = {Blip: "blip", Florence2: "florence2", QwenVL: "qwen-vl", JoyCaption: "joycaption"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny model, made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> str:
        return str(root / name if (root / name).exists() else GENERATED[name][1](root / name))

    return folder


def plain_and_noise(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (40, 40 + 24 * i, 3), np.uint8)) for i in range(count - 2)]
    return [Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "black"), *noise]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_captions(name: str, models: Callable[[str], str], tmp_path: Path) -> None:
    captioner, _, prompts = GENERATED[name]
    folder, pictures = models(name), plain_and_noise(5)
    items = [item(tmp_path, picture, f"p{i}") for i, picture in enumerate(pictures)]
    said: list[list[str]] = []
    for prompt in prompts:
        with captioner(options(base=folder, prompt=prompt, tokens=9)).loaded() as write:
            together = list(write(items, pictures))
            alone = [write([one], [picture])[0] for one, picture in zip(items, pictures, strict=True)]
            again = list(write(items[::-1], pictures[::-1]))[::-1]
        assert together == alone == again
        assert together[0] != together[1]
        assert not any(set("<>[]") & set(text) for text in together)
        said.append(together)
    assert said[0] != said[1]
    if captioner is Blip:
        assert all(text.startswith("a photo of") for text in said[1])
    else:
        assert all(len(text.split()) <= 9 for text in said[0])


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of a network's generate is given."""
    calls: list[dict[str, Any]] = []
    real = model.on_device

    def watched(network: Any, device: str) -> Any:
        generate = network.generate
        network.generate = lambda **kwargs: (calls.append(kwargs), generate(**kwargs))[1]
        return real(network, device)

    monkeypatch.setattr(model, "on_device", watched)
    return calls


@pytest.mark.parametrize(("name", "unit"), [("qwen2.5-vl", 28), ("qwen3-vl", 32)])
def test_qwen_gets_a_place_for_each_square_of_a_picture(
    name: str, unit: int, models: Callable[[str], str], given: list[dict[str, Any]]
) -> None:
    """`unit` is what one place stands for, in pixels of a side: two patches."""
    pictures = [Image.new("RGB", (4 * unit, 2 * unit), "red"), Image.new("RGB", (2 * unit, 2 * unit), "blue")]
    with QwenVL(options(base=models(name), tokens=2)).loaded() as write:
        write([], pictures)
    (inputs,) = given
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 8], [1, 4, 4]]
    places, real = inputs["input_ids"] == 5, inputs["attention_mask"].bool()
    assert places.sum(1).tolist() == [8, 4]
    assert torch.equal(inputs["mm_token_type_ids"].bool(), places)
    assert (real.sum(1).tolist()[0], (~real).sum(1).tolist()) == (real.shape[1], [0, 4])
    assert not real[1, :4].any()  # filled up on the left
    assert inputs["input_ids"][0].tolist().count(1) == 2  # a <s> for each side of the talk, and none in front
    assert inputs["pixel_values"].shape == (32 + 16, 3 * 2 * (unit // 2) ** 2)
    assert (inputs["do_sample"], inputs["max_new_tokens"]) == (False, 2)


def test_joycaption_begins_its_text_once(models: Callable[[str], str], given: list[dict[str, Any]]) -> None:
    with JoyCaption(options(base=models("joycaption"), tokens=2)).loaded() as write:
        write([], [Image.new("RGB", (64, 64), "red")])
    ids = given[0]["input_ids"][0].tolist()
    assert (ids.count(1), ids[0], ids.count(5)) == (1, 1, 4)  # <s>, and a place for each of 2 x 2 patches


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [
        ("A dog. It runs", False, "A dog."),
        ("A dog. It runs", True, "A dog. It runs"),
        ("A 2.5 m tall dog and", False, "A 2.5 m tall dog and"),
        ("1girl, long hair, blue ey", False, "1girl, long hair"),
        ("Really? A dog!\nIt", False, "Really? A dog!"),
    ],
)
def test_an_answer_that_was_cut_off(text: str, ended: bool, kept: str) -> None:
    assert whole(text, ended=ended) == kept


def test_half_the_bits_are_taken_when_they_are_asked_for(
    models: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: set[torch.dtype] = set()
    real = model.on_device

    def watched(network: Any, device: str) -> Any:
        dtypes.update(weight.dtype for weight in network.parameters())
        return real(network, device)

    monkeypatch.setattr(model, "on_device", watched)
    for name in GENERATED:
        captioner = GENERATED[name][0]
        plain, half = (captioner(options(base=models(name), tokens=3, dtype=dtype)) for dtype in ("auto", "bf16"))
        assert plain.parameters() != half.parameters()
        dtypes.clear()
        with half.loaded() as write:
            assert write([], plain_and_noise(2))
        assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", GENERATED)
def test_a_model_is_gone_when_its_stage_is_over(
    name: str, models: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    real = model.on_device

    def watched(network: Any, device: str) -> Any:
        loaded.extend((weakref.ref(network), *(weakref.ref(weight) for weight in network.parameters())))
        return real(network, device)

    monkeypatch.setattr(model, "on_device", watched)
    items = [item(tmp_path, picture, f"p{i}") for i, picture in enumerate(plain_and_noise(2))]
    chosen = {"base": models(name), "device": "cpu", "tokens": 2}
    captioned(items, tmp_path, data(captioner=NAMES[GENERATED[name][0]], caption_model=chosen))
    gc.collect()
    assert len(loaded) > 10
    assert not [one for one in loaded if one() is not None]


def batches_of(monkeypatch: pytest.MonkeyPatch, fail: Callable[[int], None]) -> list[int]:
    """The sizes of the batches that BLIP's picture tower is run on, after `fail` let them through."""
    sizes: list[int] = []
    real = model.on_device

    def hook(_: Any, args: Any, given: Any) -> None:
        fail(len(given["pixel_values"]))
        sizes.append(len(given["pixel_values"]))

    def watched(network: Any, device: str) -> Any:
        network.vision_model.register_forward_pre_hook(hook, with_kwargs=True)
        return real(network, device)

    monkeypatch.setattr(model, "on_device", watched)
    return sizes


def test_what_was_captioned_before_an_interruption_is_kept(
    models: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [item(tmp_path, picture, f"p{i}") for i, picture in enumerate(plain_and_noise(7))]

    def captions(size: int) -> list[str]:
        chosen = {"base": models("blip"), "device": "cpu", "tokens": 4, "batch_size": size}
        return [done.caption for done in captioned(items, tmp_path, data(captioner="blip", caption_model=chosen))]

    calls = itertools.count()

    def killed(size: int) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        sizes = batches_of(patch, killed)
        with pytest.raises(KeyboardInterrupt):
            captions(2)
        assert sizes == [2, 2]
    sizes = batches_of(monkeypatch, lambda _: None)
    resumed = captions(3)
    assert sizes == [2, 1]
    shutil.rmtree(tmp_path / "cache")
    assert captions(7) == resumed


def test_a_batch_that_does_not_fit_is_halved(
    models: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = [item(tmp_path, picture, f"p{i}") for i, picture in enumerate(plain_and_noise(9))]
    chosen = {"base": models("blip"), "device": "cpu", "tokens": 4, "batch_size": 6}
    blip = data(captioner="blip", caption_model=chosen)
    room = 2

    def full(size: int) -> None:
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    sizes = batches_of(monkeypatch, full)
    halved = captioned(items, tmp_path, blip)
    assert sizes == [1] * 9  # 6 and 3 do not fit
    assert "the memory does not hold 6 at once: going on with 3" in caplog.text
    shutil.rmtree(tmp_path / "cache")
    room = 9
    assert captioned(items, tmp_path, blip) == halved
    shutil.rmtree(tmp_path / "cache")
    room = 0
    with pytest.raises(PreprocessError, match="does not hold the model and one input"):
        captioned(items, tmp_path, blip)


def test_a_dataset_with_generated_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, colour in {"a": "red", "b": "black"}.items():
        Image.new("RGB", (700, 64), colour).save(source / f"{name}.png")
    (source / "b.txt").write_text("a dog")
    model = {"base": str(tiny.blip(tmp_path / "model")), "tokens": 5, "device": "cpu"}
    with caplog.at_level(logging.INFO, "preprocess"):
        report = build(str(source), tmp_path / "run", data(captioner="blip", caption_model=model), 64, 16)
    assert [one.caption_from for one in report.items] == ["blip", "b.txt"]
    assert report.items[0].caption.startswith("TOK, ")
    assert len(report.items[0].caption.split()) > 3
    assert "a.png: " in caplog.text
    assert "'a dog' becomes 'TOK, a dog'" in caplog.text


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    folder = tiny.blip(tmp_path / "model")
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())
    with pytest.raises(PreprocessError, match="cannot be loaded"), Blip(options(base=str(folder))).loaded():
        pass
