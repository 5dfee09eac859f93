"""Captions for pictures that come without one: what each captioner writes, what is kept of it, when it is refused."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import logging
import re
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import CLIPModel

from preprocess import Item, PreprocessError, build
from preprocess.__main__ import main as preprocessing
from preprocess.captioners import model
from preprocess.captioners.chat import JoyCaption, QwenVL, whole
from preprocess.captioners.clip import Clip, Picker, fillings, moved
from preprocess.captioners.files import words
from preprocess.captioners.generated import Blip, Florence2
from preprocess.captioners.vocabulary import Vocabulary, read_vocabulary
from preprocess.captions import captioned
from testbed.clip import vocabulary
from testbed.judge import one_thing
from testbed.pictures import COLOURS, FILLS, PLACES, SIZES, Scene, Thing, render
from testbed.shapes import HELD_OUT_SHAPES
from trainer import cog_door, run
from trainer.args import CaptionModelArgs, DataArgs, TrainArgs

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "testbed/base/clip"


def data(**options: Any) -> DataArgs:
    return DataArgs.model_validate({"source": "", **options})


def clip_data(**model: Any) -> DataArgs:
    return data(captioner="clip", caption_model={"device": "cpu", **model})


def options(**model: Any) -> CaptionModelArgs:
    return CaptionModelArgs.model_validate({"device": "cpu", **model})


def item(folder: Path, picture: Image.Image, name: str, **known: Any) -> Item:
    file = folder / f"{name}.png"
    picture.save(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Item(name, file.name, digest, picture.width, picture.height, f"{name}.png", **known)


def uncaptioned(folder: Path, count: int, seed: int) -> tuple[list[Scene], list[Item]]:
    rng = np.random.default_rng(seed)
    scenes = [one_thing(rng, knows=False) for _ in range(count)]
    return scenes, [item(folder, render(scene, rng, 64 + 16 * (i % 2)), f"p{i}") for i, scene in enumerate(scenes)]


def few_words(folder: Path) -> Path:
    """A vocabulary that takes little time."""
    file = folder / "words.json"
    slots = {"c": ["red", "blue"], "b": ["white", "orange"]}
    file.write_text(json.dumps({"compare": "a {c} star on a {b} background", "slots": slots}))
    return file


def test_clip_names_the_colours_and_backgrounds_of_uncaptioned_pictures(tmp_path: Path) -> None:
    scenes, items = uncaptioned(tmp_path, 10, seed=17)
    captions = [done.caption for done in captioned(items, tmp_path, clip_data(batch_size=10))]
    assert {done.split(" on a")[-1].split()[-1] for done in captions} == {"background"}
    colour = [f" {s.things[0].colour} shape" in text for s, text in zip(scenes, captions, strict=True)]
    behind = [  # of a gradient between two colours a caption can name one
        any(f" {name} background" in text for name in s.background) for s, text in zip(scenes, captions, strict=True)
    ]
    assert sum(colour) >= 0.9 * len(scenes)
    assert sum(behind) >= 0.9 * len(scenes)


def test_clip_describes_shapes_that_it_has_no_word_for(tmp_path: Path) -> None:
    """80 renderings of the held-out shapes, in ten pairs of colours, every colour once before and once behind."""
    rng = np.random.default_rng(23)
    names = [str(name) for name in rng.permutation(list(COLOURS))]
    looks = itertools.product(zip(names, names[3:] + names[:3], strict=True), HELD_OUT_SHAPES, ("flat", "striped"))
    scenes = [
        Scene((Thing(shape, colour, fill, list(SIZES)[i % 3]),), (background,))
        for i, ((colour, background), shape, fill) in enumerate(looks)
    ]
    items = [item(tmp_path, render(scene, rng), f"p{i}") for i, scene in enumerate(scenes)]
    captions = [done.caption for done in captioned(items, tmp_path, clip_data(batch_size=40))]
    right: dict[str, list[bool]] = {"colour": [], "background": [], "size": [], "fill": [], "place": []}
    for scene, text in zip(scenes, captions, strict=True):
        thing = scene.things[0]
        said = text.split(" shape ")[0].split()
        right["colour"].append(said[-1] == thing.colour)
        right["background"].append(text.endswith(f" {scene.background[0]} background"))
        right["size"].append(({"small", "large"} & set(said) or {"medium"}) == {thing.size})
        right["fill"].append((set(FILLS) & set(said) or {"flat"}) == {thing.fill})
        right["place"].append(not any(place in text for place in PLACES.values()))
    shares = {name: sum(hits) / len(hits) for name, hits in right.items()}
    assert len(scenes) == 80
    assert min(shares["colour"], shares["background"], shares["place"]) >= 0.9, shares
    assert min(shares["size"], shares["fill"]) >= 0.8, shares


def test_the_shipped_vocabulary_has_the_words_of_the_pictures() -> None:
    shipped = read_vocabulary(CLIP / "vocabulary.json")
    assert shipped == Vocabulary.model_validate(vocabulary())
    assert shipped.slots["colour"] == tuple(COLOURS)


def test_clip_agrees_with_the_similarity_of_the_whole_caption(tmp_path: Path) -> None:
    """With two slots the pair is chosen over all pairs: what transformers' own forward pass scores highest."""
    from transformers import AutoImageProcessor, AutoTokenizer

    vocabulary = {
        "compare": "a {c} star on a {b} background",
        "slots": {"c": ["red", "blue"], "b": ["white", "orange"]},
    }
    file = tmp_path / "words.json"
    file.write_text(json.dumps(vocabulary))
    rng = np.random.default_rng(3)
    items = [item(tmp_path, render(one_thing(rng, knows=False), rng), f"p{i}") for i in range(6)]
    texts = ["a red star on a white background", "a red star on an orange background",
             "a blue star on a white background", "a blue star on an orange background"]  # fmt: skip
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(CLIP.parent / "tokenizer")(
        texts, padding="max_length", max_length=32, return_tensors="pt"
    ).input_ids
    pixels = AutoImageProcessor.from_pretrained(CLIP, backend="pil")(
        images=[Image.open(tmp_path / done.file) for done in items], return_tensors="pt"
    ).pixel_values
    with torch.inference_mode():
        best = clip(input_ids=ids, pixel_values=pixels).logits_per_image.argmax(1).tolist()
    done = captioned(items, tmp_path, clip_data(vocabulary=str(file)))
    assert [one.caption for one in done] == [texts[i] for i in best]
    assert len(set(best)) > 1


def test_the_first_two_slots_are_chosen_as_a_pair() -> None:
    """One at a time would stop at red white, whose neighbours are all worse."""
    words = Vocabulary(compare="{c} {b}", slots={"c": ("red", "blue"), "b": ("white", "orange")})
    suits = {"red white": 0.8, "blue orange": 1.0, "blue white": 0.0, "red orange": 0.1}
    texts = list(suits)

    def encode(some: list[str]) -> torch.Tensor:
        return torch.eye(4)[[texts.index(text) for text in some]]

    assert Picker(words, encode, 1.0)(torch.tensor([list(suits.values())])) == ["blue orange"]


def test_a_phrase_counts_as_all_captions_that_hold_it() -> None:
    """Against sums over the whole product in numpy; the nearest single caption says something else now and then."""
    slots = {"a": ("u", "v"), "b": ("w", "x"), "c": ("1", "2", "3"), "d": ("4", "5", "6", "7")}
    words = Vocabulary(compare="{a} {b} {c} {d}", slots=slots)
    rng = np.random.default_rng(2)
    whole = list(itertools.product(*slots.values()))
    rows = {" ".join(one): rng.standard_normal(8) for one in whole}
    pictures = rng.standard_normal((40, 8))

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.tensor(np.stack([rows[text] for text in texts]))

    nearest: list[str] = []
    expected: list[str] = []
    for picture in pictures:
        similar = np.array([rows[" ".join(one)] @ picture for one in whole])
        nearest.append(" ".join(whole[int(similar.argmax())]))
        counts = np.exp(0.3 * similar).reshape(2, 2, 3, 4)
        a, b = np.unravel_index(counts.sum((2, 3)).argmax(), (2, 2))
        c, d = counts[a, b].sum(1).argmax(), counts[a, b].sum(0).argmax()
        expected.append(" ".join(names[i] for names, i in zip(slots.values(), (a, b, c, d), strict=True)))
    assert Picker(words, encode, 0.3)(torch.tensor(pictures)) == expected
    assert sum(one == other for one, other in zip(nearest, expected, strict=True)) < 30


def test_too_many_fillings_are_drawn_evenly() -> None:
    slots = [[f"{name}{i}" for i in range(count)] for name, count in (("a", 7), ("b", 20), ("c", 3))]
    assert fillings(slots, 420) == list(itertools.product(*slots))
    drawn = fillings(slots, 40)
    assert drawn == fillings(slots, 40) != fillings(slots, 41)[:40]
    assert len(set(drawn)) > 35
    for slot, phrases in enumerate(slots):
        counts = Counter(one[slot] for one in drawn)
        assert set(counts) == set(phrases)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert {one[1] for one in fillings(slots, 5)} == set(slots[1])  # no phrase is left out
    assert fillings([], 5) == [()]


def test_a_picture_is_also_seen_moved_to_each_side() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    views = [np.asarray(view).astype(int) for view in moved(picture)]
    plain = np.asarray(picture).astype(int)
    assert all(view.shape == plain.shape for view in views)
    _, down, up, right, left = views
    assert (views[0] == plain).all()
    assert (right[:, 2:] == plain[:, :-2]).all()
    assert (right[:, :2] == plain[:, :1]).all()
    assert (left[:, :-2] == plain[:, 2:]).all()
    assert (left[:, -2:] == plain[:, -1:]).all()
    assert (down[2:] == plain[:-2]).all()
    assert (up[:-2] == plain[2:]).all()


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


def test_a_clip_without_tokenizer_or_vocabulary_says_so(tmp_path: Path) -> None:
    alone = shutil.copytree(CLIP, tmp_path / "clip")
    with pytest.raises(PreprocessError, match="has no tokenizer, neither in its folder nor in tokenizer beside it"):
        Clip(options(base=str(alone)))
    (alone / "vocabulary.json").unlink()
    with pytest.raises(PreprocessError, match=r"comes without a vocabulary\.json"):
        Clip(options(base=str(alone)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no vocabulary: the file"),
        ('{"compare": "a", "slots": {}}', "needs at least one slot"),
        ('{"compare": "a {b}", "slots": {"b": []}}', "and a phrase in each"),
        ('{"compare": "a {b}", "slots": {"c": ["x"]}}', "compare names the slots b, and slots holds c"),
        ('{"compare": "a {b}", "write": "{z}", "slots": {"b": ["x"]}}', "write names z, and slots holds b"),
        ('{"compare": "a {b.x}", "slots": {"b": ["x"]}}', r"compare names the slots b\.x"),
        ('{"compare": "a {b", "slots": {"b": ["x"]}}', "is no vocabulary: "),
        ('{"compare": "a {b}", "slots": {"b": ["x"]}, "extra": 1}', "extra: "),
    ],
)
def test_a_vocabulary_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text(content)
    with pytest.raises(PreprocessError, match=message):
        read_vocabulary(file)


def test_a_vocabulary_with_too_many_pairs(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    slots = {"a": [str(i) for i in range(200)], "b": [str(i) for i in range(101)]}
    file.write_text(Vocabulary(compare="{a} {b}", slots={k: tuple(v) for k, v in slots.items()}).model_dump_json())
    with pytest.raises(PreprocessError, match="make 20200 pairs, and 20000 are allowed"):
        read_vocabulary(file)


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


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    folder = tiny.blip(tmp_path / "model")
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())
    with pytest.raises(PreprocessError, match="cannot be loaded"), Blip(options(base=str(folder))).loaded():
        pass


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
