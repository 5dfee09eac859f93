"""Captions for pictures that come without one: whose are kept, what they depend on, when a captioner is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captioning import CLIP, ROOT, clip_data, data, few_words, item, uncaptioned
from PIL import Image
from transformers import CLIPModel

from preprocess import PreprocessError
from preprocess.__main__ import main as preprocessing
from preprocess.captioners.clip import Clip
from preprocess.captioners.files import words
from preprocess.captions import captioned
from testbed.judge import one_thing
from testbed.pictures import COLOURS, render
from trainer import cog_door, run
from trainer.args import DataArgs, TrainArgs


def test_own_captions_stay_unless_all_are_written_anew(tmp_path: Path) -> None:
    red = Image.new("RGB", (64, 64), COLOURS["red"])
    items = [item(tmp_path, red, "a", caption="mine", caption_from="a.txt"), item(tmp_path, red, "b")]
    model = {"vocabulary": str(few_words(tmp_path))}
    kept = captioned(items, tmp_path, clip_data(**model))
    assert (kept[0].caption, kept[0].caption_from) == ("mine", "a.txt")
    assert (kept[1].caption_from, "star" in kept[1].caption) == ("clip", True)
    anew = captioned(items, tmp_path, clip_data(**model).model_copy(update={"recaption": True}))
    assert [one.caption for one in anew] == [kept[1].caption] * 2
    nothing = captioned(items, tmp_path, data(captioner="none"))
    assert [(one.caption, one.caption_from) for one in nothing] == [("a TOK", "data.caption")] * 2


def test_the_model_is_loaded_for_what_is_missing_only_and_freed_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    batches: list[int] = []
    real = CLIPModel.from_pretrained

    def load(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        models.append(model)
        model.vision_model.register_forward_hook(
            lambda _, __, out: batches.append(len(out.pooler_output) // 5)  # each is seen five times
        )
        return model

    monkeypatch.setattr(CLIPModel, "from_pretrained", load)
    _, items = uncaptioned(tmp_path, 7, seed=5)

    def quick(batch_size: int) -> DataArgs:
        return clip_data(batch_size=batch_size, vocabulary=str(few_words(tmp_path)))

    first = captioned(items[:5], tmp_path, quick(3))
    assert batches == [3, 2]
    again = captioned(items[:5], tmp_path, quick(2))
    assert (again, len(models), batches) == (first, 1, [3, 2])
    more = captioned(items, tmp_path, quick(4))
    assert (more[:5], len(models), sum(batches)) == (first, 2, 7)
    assert all(weight.is_meta for model in models for weight in model.parameters())  # no memory is held
    captioned([item(tmp_path, Image.new("RGB", (32, 32)), "own", caption="x")], tmp_path, quick(1))
    assert len(models) == 2


def test_what_a_caption_depends_on_is_in_its_key(tmp_path: Path) -> None:
    _, (picture,) = uncaptioned(tmp_path, 1, seed=5)
    kept = tmp_path / "cache/captions"
    few = str(few_words(tmp_path))
    captioned([picture], tmp_path, clip_data(vocabulary=few))
    captioned([picture], tmp_path, clip_data(vocabulary=few, batch_size=3))
    assert len(list(kept.iterdir())) == 1
    captioned([picture], tmp_path, clip_data(vocabulary=few, side=32))
    assert len(list(kept.iterdir())) == 2
    other = json.loads(Path(few).read_text())
    other["write"] = "{c}"
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = captioned([picture], tmp_path, clip_data(vocabulary=str(tmp_path / "other.json")))
    assert done[0].caption in ("red", "blue")
    copy = shutil.copytree(CLIP.parent, tmp_path / "base", ignore=shutil.ignore_patterns("unet", "vae")) / "clip"
    captioned([picture], tmp_path, clip_data(vocabulary=few, base=str(copy)))
    assert len(list(kept.iterdir())) == 3  # the same files elsewhere are the same model
    (copy / "preprocessor_config.json").write_text((copy / "preprocessor_config.json").read_text() + "\n")
    captioned([picture], tmp_path, clip_data(vocabulary=few, base=str(copy)))
    assert len(list(kept.iterdir())) == 4


MINE = """
from contextlib import contextmanager

class Mine:
    version = 1
    sees = True

    def __init__(self, options):
        self._prompt = options.prompt

    def parameters(self):
        return {"prompt": self._prompt}

    @contextmanager
    def loaded(self):
        yield lambda items, images: [f"{self._prompt} of {image.getpixel((0, 0))[0]}" for image in images]
"""


def test_a_captioner_of_ones_own_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, red in {"a": 200, "b": 100}.items():
        Image.new("RGB", (64, 64), (red, 0, 0)).save(source / f"{name}.png")
    (tmp_path / "my_captions.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for i, spec in enumerate(("my_captions:Mine", f"{tmp_path / 'my_captions.py'}:Mine")):
        out = tmp_path / f"out{i}"
        words = [str(source), "--out", str(out), "--resolution", "64", "--step", "16"]
        assert preprocessing([*words, "--captioner", spec, "--caption_model.prompt", "a shade"]) == 0
        rows = [json.loads(line) for line in (out / "dataset.jsonl").read_text().splitlines()]
        assert [row["caption"] for row in rows] == ["TOK, a shade of 200", "TOK, a shade of 100"]
        assert {row["caption_from"] for row in rows} == {spec}
    marker = tmp_path / "ran"
    (tmp_path / "hostile_captions.py").write_text(f"open({str(marker)!r}, 'w')\n{MINE}")
    sent = shutil.make_archive(str(tmp_path / "sent"), "zip", source)
    blank: dict[str, Any] = {"concept_mode": "object", "input_images": Path(sent)}
    refused = r"data\.captioner .* would import code, which is refused here"
    for spec in ("hostile_captions:Mine", f"{tmp_path / 'hostile_captions.py'}:Mine"):
        with pytest.raises(cog_door.TrainingError, match=refused):
            cog_door.train({**blank, "args": json.dumps({"data": {"captioner": spec}})})
    assert not marker.exists()


def test_pictures_are_shrunk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []

    class Sizes(Clip):
        version = 1

        def loaded(self) -> Any:
            from contextlib import nullcontext

            def write(items: Any, images: list[Image.Image]) -> list[str]:
                sizes.extend(image.size for image in images)
                return ["x"] * len(images)

            return nullcontext(write)

    monkeypatch.setitem(__import__("preprocess.captions").captions.CAPTIONERS, "sizes", "test_captioners:Sizes")
    monkeypatch.setattr("test_captioners.Sizes", Sizes, raising=False)
    pictures = [item(tmp_path, Image.new("RGB", (1000, 250)), "a"), item(tmp_path, Image.new("RGB", (20, 30)), "b")]
    captioned(pictures, tmp_path, data(captioner="sizes", caption_model={"side": 100}))
    assert sizes == [(100, 25), (20, 30)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("set/red_dog-2 (1).png", "red dog"),
        ("IMG_20240101.jpg", ""),
        ("a-small.cat.png", "a small cat"),
        ("ein Hündchen.webp", "ein Hündchen"),
    ],
)
def test_words_of_a_file_name(path: str, expected: str) -> None:
    assert words(path) == expected


def test_filename_captions_and_the_default_where_a_name_says_nothing(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32))
    items = [item(tmp_path, picture, "red_dog"), item(tmp_path, picture, "003")]
    done = captioned(items, tmp_path, data(captioner="filename"))
    assert [(one.caption, one.caption_from) for one in done] == [("red dog", "filename"), ("a TOK", "data.caption")]


@pytest.mark.parametrize(
    ("captioner", "model", "message"),
    [
        ("clop", {}, r"data\.captioner 'clop' is unknown; did you mean clip\?"),
        ("clip", {"base": "nobody/nothing"}, "a hub id needs data.caption_model.revision"),
        ("clip", {"base": "no such folder!"}, "neither a folder nor a hub id"),
        ("clip", {"base": "testbed/base/unet"}, "is a model of type None, and 'clip' is needed"),
        ("clip", {"base": str(CLIP), "revision": "main"}, "is a folder, which has no revisions"),
        ("clip", {"prompt": "a"}, "prompt is for blip, florence2, qwen-vl and joycaption; clip does not use it"),
        ("clip", {"tokens": 9}, "tokens is for captioners that write sentences; clip does not use it"),
        ("clip", {"dtype": "bf16"}, "dtype is for blip"),
        ("blip", {"general_threshold": 0.5}, "general_threshold is for wd-tagger; blip does not use it"),
        ("clip", {"vocabulary": "none.json"}, r"vocabulary 'none\.json' cannot be read"),
        ("blip", {"vocabulary": "words.json"}, "vocabulary is for clip"),
        ("blip", {"base": str(CLIP)}, "is a model of type 'clip', and 'blip' is needed"),
        ("florence2", {"prompt": "<OD>"}, "writes captions for the tasks <CAPTION>, <DETAILED_CAPTION>"),
        ("qwen-vl", {"base": str(CLIP)}, "is a model of type 'clip', and 'qwen2_5_vl' or 'qwen3_vl' is needed"),
        ("qwen-vl", {"base": "Qwen/Qwen3-VL-4B-Instruct"}, "a hub id needs data.caption_model.revision"),
        ("qwen-vl", {"prompt": "tag"}, r"prompt 'tag' is no style \(styles: descriptive, short, tags\)"),
        ("joycaption", {"prompt": "Casual"}, r"is no style \(styles: descriptive, casual, short, prompt, tags\)"),
        ("joycaption", {"base": str(CLIP)}, "is a model of type 'clip', and 'llava' is needed"),
    ],
)
def test_what_a_captioner_cannot_use(captioner: str, model: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "base" in model and model["base"].startswith("testbed"):
        model = {**model, "base": str(ROOT / model["base"])}
    picture = item(tmp_path, Image.new("RGB", (32, 32)), "a")
    with pytest.raises(PreprocessError, match=message) as caught:
        captioned([picture], tmp_path, data(captioner=captioner, caption_model={**model, "side": 64}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"caption_model": {"side": 64}}, "data.captioner sidecar uses no model"),
        ({"recaption": True}, "captioner sidecar writes no captions"),
        ({"captioner": "none", "caption_lines": True}, "leaves them unread"),
        ({"captioner": "clip", "recaption": True, "embedded_captions": True}, "leaves them unread"),
        ({"mode": "object"}, "data.class_words names no word"),
        ({"mode": "style", "keep_class": True}, "keep_class is for modes object and face"),
    ],
)
def test_options_that_would_do_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**given)


def test_a_run_on_uncaptioned_pictures(tiny_base: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    rng = np.random.default_rng(1)
    for i in range(3):
        render(one_thing(rng, knows=False), rng).save(source / f"{i}.png")
    (source / "2.txt").write_text("a drawing\na picture of a shape")
    model = {"device": "cpu", "vocabulary": str(few_words(tmp_path))}
    tree: dict[str, Any] = {
        "data": {"source": str(source), "captioner": "clip", "caption_model": model, "caption_lines": True},
        "model": {"base": str(tiny_base)},
        "sample": {"steps": 1, "strengths": []},
        "runtime": {"out": str(tmp_path / "runs"), "steps": 2, "batch_size": 2, "device": "cpu"},
    }
    tree["data"] |= {"mode": "object", "class_words": ["star", "shape"]}
    args = TrainArgs.model_validate(tree)
    with run.opened(args) as session:
        assert len(list(session.steps())) == 2
        rows = [json.loads(line) for line in session.dir.dataset.read_text().splitlines()]
    assert [row["caption_from"] for row in rows] == ["clip", "clip", "2.txt"]
    for row in rows[:2]:
        assert re.fullmatch(r"a (red|blue) TOK on an? (white|orange) background", row["caption"])
    assert rows[2]["captions"] == ["TOK, a drawing", "a picture of a TOK"]


def test_a_captioner_is_looked_for_before_anything_is_loaded(tmp_path: Path) -> None:
    base = {
        "model": {"base": str(tmp_path / "none"), "family": "sd15"},
        "runtime": {"out": str(tmp_path), "device": "cpu"},
    }
    for captioner, message in (("my.captions:Mine", "would import code"), ("clop", "did you mean clip")):
        args = TrainArgs.model_validate({"data": {"source": "x", "captioner": captioner}, **base})
        with pytest.raises(ValueError, match=message), run.opened(args, code=False):
            pass
