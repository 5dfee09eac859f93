"""The clip captioner: what it reads off a picture, and the vocabulary that it chooses from."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from captioning import CLIP, clip_data, item, options, uncaptioned
from PIL import Image
from transformers import CLIPModel

from preprocess import PreprocessError
from preprocess.captioners.clip import Clip, Picker, fillings, moved
from preprocess.captioners.vocabulary import Vocabulary, read_vocabulary
from preprocess.captions import captioned
from testbed.clip import vocabulary
from testbed.judge import one_thing
from testbed.pictures import COLOURS, FILLS, PLACES, SIZES, Scene, Thing, render
from testbed.shapes import HELD_OUT_SHAPES


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
