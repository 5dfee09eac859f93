"""Tags by a real ONNX graph whose scores are known: where they go, in which order, from what they are seen."""

from __future__ import annotations

import csv
import gc
import hashlib
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from preprocess import Item, PreprocessError
from preprocess.captioners import tagger
from preprocess.captioners.tagger import WdTagger, read_tags, spelled, squared
from preprocess.captions import captioned
from trainer.args import CaptionModelArgs, DataArgs

SIDE = 16
TAGS = (("safe", 9), ("red_sky", 0), ("green", 0), ("blue_sea_(place)", 0), ("^_^", 0), ("who_(series)", 4), ("odd", 1))
# Each score is a share of 255 of the mean of a channel (B, G, R), or of the topmost row's, as a matrix over both.
WEIGHTS = {"safe": "BGR", "red_sky": "R", "green": "G", "blue_sea_(place)": "B", "^_^": "edge", "who_(series)": "R",
           "odd": "R"}  # fmt: skip


def graph(batch: int | str = "N", *, channels: int = 3, gain: float = 1 / 255) -> onnx.ModelProto:
    """[N, side, side, 3] -> mean of the channels and brightness of the topmost row -> a score for each tag."""
    columns = {"B": 0, "G": 1, "R": 2}
    weights = np.zeros((channels + 1, len(TAGS)), np.float32)
    for i, (name, _) in enumerate(TAGS):
        if WEIGHTS[name] == "edge":
            weights[-1, i] = gain
        for letter in WEIGHTS[name] if WEIGHTS[name] != "edge" else "":
            weights[columns[letter], i] = gain / len(WEIGHTS[name])
    constants = {"w": weights, "start": np.array([0]), "end": np.array([1]), "axis": np.array([1]),
                 "sides": np.array([1, 2]), "all": np.array([1, 2, 3])}  # fmt: skip
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "sides"], ["means"], keepdims=0),
        helper.make_node("Slice", ["pixels", "start", "end", "axis"], ["top"]),
        helper.make_node("ReduceMean", ["top", "all"], ["bright"], keepdims=0),
        helper.make_node("Unsqueeze", ["bright", "axis"], ["edge"]),
        helper.make_node("Concat", ["means", "edge"], ["seen"], axis=1),
        helper.make_node("MatMul", ["seen", "w"], ["scores"]),
    ]
    made = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, SIDE, SIDE, channels])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, len(TAGS)])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def folder(path: Path, model: onnx.ModelProto | None = None, tags: tuple[tuple[str, int], ...] = TAGS) -> Path:
    path.mkdir()
    onnx.save(model or graph(), path / "model.onnx")
    with (path / "selected_tags.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("tag_id", "name", "category", "count"), *((i, *t, 5) for i, t in enumerate(tags))])
    return path


def options(base: Path, **more: Any) -> CaptionModelArgs:
    return CaptionModelArgs.model_validate({"device": "cpu", "base": str(base), **more})


def tagged(base: Path, *pictures: Image.Image, **more: Any) -> list[str]:
    with WdTagger(options(base, **more)).loaded() as write:
        return list(write([], pictures))


def test_the_tags_of_pictures_in_known_colours(tmp_path: Path) -> None:
    base = folder(tmp_path / "m")
    colours = {
        (255, 0, 0): "who (series), red sky",  # the topmost row has a mean of 1/3, which is under 0.35
        (0, 255, 0): "green",
        (0, 0, 255): "blue sea (place)",
        (120, 0, 200): "blue sea (place), red sky, ^_^",
        (0, 0, 0): "",
    }
    assert tagged(base, *(Image.new("RGB", (SIDE, SIDE), c) for c in colours)) == list(colours.values())
    assert tagged(base, Image.new("RGB", (SIDE, SIDE), (80, 60, 0)), general_threshold=0.2) == ["red sky, green"]


def test_a_threshold_is_reached_and_each_kind_has_its_own(tmp_path: Path) -> None:
    base = folder(tmp_path / "m")
    just, under = (Image.new("RGB", (SIDE, SIDE), (r, 0, 0)) for r in (217, 216))  # 0.851 and 0.847 of 255
    assert tagged(base, just, under) == ["who (series), red sky", "red sky"]
    assert tagged(base, under, character_threshold=0.84) == ["who (series), red sky"]
    assert tagged(base, just, general_threshold=0.9) == ["who (series)"]
    assert tagged(base, just, general_threshold=0.25) == ["who (series), red sky, ^_^"]


def test_a_picture_is_padded_to_a_white_square(tmp_path: Path) -> None:
    wide = Image.new("RGB", (SIDE, SIDE // 2), (0, 0, 0))
    wide.putpixel((0, 0), (1, 2, 3))
    pixels = squared(wide, SIDE)
    expected = np.full((SIDE, SIDE, 3), 255, np.float32)
    expected[4:12] = 0
    expected[4, 0] = (3, 2, 1)  # blue first
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, expected)
    tall = squared(Image.new("RGB", (10, 40), (0, 0, 0)), SIDE)
    assert np.array_equal(tall[:, :, 0], tall[:, ::-1, 0])
    assert (tall[:, 0] == 255).all()
    assert (tall[:, SIDE // 2] == 0).all()
    assert tagged(folder(tmp_path / "m"), wide)[0].startswith("^_^")  # the white above it


@pytest.mark.parametrize("batch", ["N", 1, 2])
def test_graphs_for_one_picture_or_for_many(batch: int | str, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", graph(batch))
    red, green = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime"))
    expected = ["who (series), red sky", "green"]
    assert tagged(base, red, green) == expected
    assert tagged(base, red, green, red) == [*expected, expected[0]]


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        ("long_hair", "long hair"),
        ("hatsune_miku_(vocaloid)", "hatsune miku (vocaloid)"),
        ("no_u", "no u"),
        ("1girl", "1girl"),
        *((face, face) for face in ("0_0", "(o)_(o)", "+_-", "<|>_<|>", ">_<", "3_3", ">_o", "^_^", "u_u", "||_||")),
    ],
)
def test_underscores_are_spaces_but_in_faces(tag: str, text: str) -> None:
    assert spelled(tag) == text


def item(root: Path, picture: Image.Image, name: str) -> Item:
    picture.save(root / f"{name}.png")
    digest = hashlib.sha256((root / f"{name}.png").read_bytes()).hexdigest()
    return Item(name, f"{name}.png", digest, *picture.size, f"{name}.png")


def test_as_a_captioner_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder(tmp_path / "m")
    items = [item(tmp_path, Image.new("RGB", (64, 64), c), c) for c in ("red", "lime", "black")]
    loaded: list[weakref.ref[Any]] = []
    real = tagger._session

    def watched(*args: Any) -> Any:
        session = real(*args)
        loaded.append(weakref.ref(session))
        return session

    monkeypatch.setattr(tagger, "_session", watched)

    def captions(**more: Any) -> list[tuple[str, str]]:
        tree = {"source": "", "captioner": "wd-tagger", "caption_model": {"base": str(base), "device": "cpu", **more}}
        return [(one.caption, one.caption_from) for one in captioned(items, tmp_path, DataArgs.model_validate(tree))]

    first = captions()
    expected = [("who (series), red sky", "wd-tagger"), ("green", "wd-tagger"), ("a TOK", "data.caption")]
    assert first == expected
    gc.collect()
    assert loaded[0]() is None
    assert captions(batch_size=1) == first
    assert len(loaded) == 1  # all of it was kept
    assert captions(character_threshold=1.0)[0] == ("who (series), red sky", "wd-tagger")
    assert captions(general_threshold=1.0)[1] == ("green", "wd-tagger")
    assert len(loaded) == 3
    lines = (base / "selected_tags.csv").read_text().replace("green", "very_green")
    (base / "selected_tags.csv").write_text(lines)
    assert captions()[1] == ("very green", "wd-tagger")


def custom_operator() -> onnx.ModelProto:
    model = graph()
    model.graph.node[0].domain = "com.example.library"
    model.opset_import.append(helper.make_opsetid("com.example.library", 1))
    return model


def outside(folder: Path) -> None:
    """The weights of the graph come from a file above its folder."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    weights = next(one for one in model.graph.initializer if one.name == "w")
    (folder.parent / "secret.bin").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../secret.bin")
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "model.onnx").unlink(), r"is no tagger: model\.onnx is missing"),
        (lambda f: (f / "selected_tags.csv").unlink(), r"is no tagger: selected_tags\.csv is missing"),
        (lambda f: (f / "model.onnx").write_bytes(b"\x80\x04pickle"), "is no graph that onnxruntime runs"),
        (lambda f: onnx.save(custom_operator(), f / "model.onnx"), "is no graph that onnxruntime runs"),
        (outside, "is no graph that onnxruntime runs"),
        (lambda f: onnx.save(graph(channels=4), f / "model.onnx"), r"takes an input .* and \[N, side, side, 3\]"),
        (lambda f: onnx.save(graph(gain=1.0), f / "model.onnx"), r"gives scores outside 0\.\.1"),
        (lambda f: (f / "selected_tags.csv").write_text("name,category\na,0\n"), "names 1 tags"),
        (lambda f: (f / "selected_tags.csv").write_text("name,category\n"), "names no tags"),
        (lambda f: (f / "selected_tags.csv").write_text("name,kind\na,0\n"), "no list of tags with the columns"),
        (lambda f: (f / "selected_tags.csv").write_text("name,category\na,x\n"), "no list of tags with the columns"),
        (lambda f: (f / "selected_tags.csv").write_bytes(b"name,category\n\xff,0\n"), "no list of tags"),
    ],
)
def test_a_folder_that_is_no_tagger(harm: Any, message: str, tmp_path: Path) -> None:
    base = folder(tmp_path / "m")
    harm(base)
    with pytest.raises(PreprocessError, match=message) as caught:
        tagged(base, Image.new("RGB", (SIDE, SIDE), "red"))
    assert "\n" not in str(caught.value)


def test_a_list_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tags.csv").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(PreprocessError, match="has more than the 16777216 bytes"):
        read_tags(tmp_path / "tags.csv")


def test_what_it_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder(tmp_path / "m")
    with pytest.raises(PreprocessError, match="prompt is for blip, florence2, qwen-vl and joycaption; wd-tagger"):
        WdTagger(options(base, prompt="x"))
    with pytest.raises(PreprocessError, match=r"a hub id needs data\.caption_model\.revision"):
        WdTagger(options(Path("SmilingWolf/wd-swinv2-tagger-v3")))
    with pytest.raises(PreprocessError, match="device is mps, and onnxruntime here runs wd-tagger on cpu"):
        tagged(base, Image.new("RGB", (8, 8)), device="mps")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    with pytest.raises(PreprocessError, match=r"needs onnxruntime: .*-m pip install onnxruntime"):
        WdTagger(options(base))
