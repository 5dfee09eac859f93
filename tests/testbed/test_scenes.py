"""The renderer: seeded, what the caption says, and nothing that is held out."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from testbed.concepts import CONCEPTS, training_scenes, unseen_scenes, write_zip
from testbed.pictures import (
    COLOURS,
    FILLS,
    HELD_OUT_FILLS,
    HELD_OUT_STYLES,
    Scene,
    Thing,
    caption,
    draw_scene,
    render,
)
from testbed.shapes import HELD_OUT_SHAPES, SHAPES


def test_the_base_has_enough_to_learn_and_people_have_enough_to_teach() -> None:
    assert len(SHAPES) >= 12
    assert len(COLOURS) >= 10
    assert len(FILLS) >= 6
    assert all((HELD_OUT_SHAPES, HELD_OUT_FILLS, HELD_OUT_STYLES))
    assert not set(SHAPES) & set(HELD_OUT_SHAPES)


def test_one_seed_is_one_picture() -> None:
    def picture(seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        return render(draw_scene(rng), rng).tobytes()

    assert picture(3) == picture(3)
    assert picture(3) != picture(4)


def test_random_scenes_hold_nothing_held_out() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(500)]
    assert {t.shape for s in scenes for t in s.things} == set(SHAPES)
    assert {t.fill for s in scenes for t in s.things} == set(FILLS)
    assert {s.style for s in scenes} == {None}
    assert {len(s.things) for s in scenes} == {1, 2}
    assert {len(s.background) for s in scenes} == {1, 2}


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        (Scene((Thing("star", "red"),), ("blue",)), "a red star on a blue background"),
        (
            Scene((Thing("ring", "orange", "outline", "small", "left"),), ("red", "white")),
            "a small outline orange ring on the left on a red to white gradient background",
        ),
        (Scene((Thing("heart", "orange"),), ("orange",)), "an orange heart on an orange background"),
        (
            Scene((Thing("star", "red", size="small"), Thing("moon", "pink", size="small")), ("blue",)),
            "a small red star on the left and a small pink moon on the right on a blue background",
        ),
    ],
)
def test_captions_say_what_is_drawn(scene: Scene, said: str) -> None:
    assert caption(scene) == said


def test_colours_are_where_they_should_be() -> None:
    scene = Scene((Thing("circle", "red", size="large"),), ("blue",))
    picture = np.asarray(render(scene, np.random.default_rng(0), 80, 48), int)
    assert picture.shape == (48, 80, 3)
    assert np.abs(picture[24, 40] - COLOURS["red"]).max() < 12
    assert np.abs(picture[1, 1] - COLOURS["blue"]).max() < 12


def test_edges_are_antialiased() -> None:
    picture = np.asarray(render(Scene((Thing("circle", "black"),), ("white",)), np.random.default_rng(0)))[..., 0]
    assert ((picture > 60) & (picture < 200)).sum() > 20


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_changes_the_picture_and_not_the_other_words(name: str) -> None:
    concept = CONCEPTS[name]
    plain = Scene((Thing("star", "red"),), ("blue",))
    drawn = [render(s, np.random.default_rng(1)).tobytes() for s in (plain, concept.scene(plain))]
    assert drawn[0] != drawn[1]
    prompt = concept.prompt(plain)
    assert all(word in prompt for word in ("TOK", "red", "blue"))
    assert name not in prompt


def test_judged_scenes_are_in_no_training_picture() -> None:
    concept = CONCEPTS["mushroom"]
    seen = training_scenes(concept, 10, 5)
    pairs = {(s.things[0].colour, s.background) for s in seen}
    assert all((s.things[0].colour, s.background) not in pairs for s in unseen_scenes(concept, 60, 0, seen))


def test_the_quickstart_zip_is_what_the_code_writes(tmp_path: Path) -> None:
    write_zip(tmp_path / "again.zip", "mushroom")
    shipped = Path(__file__).parents[2] / "testbed" / "quickstart" / "mushroom.zip"
    with zipfile.ZipFile(shipped) as ours, zipfile.ZipFile(tmp_path / "again.zip") as again:
        assert ours.namelist() == again.namelist()
        assert 8 <= sum(n.endswith(".png") for n in ours.namelist()) <= 12
        captions = [n for n in ours.namelist() if n.endswith(".txt")]
        assert [ours.read(n) for n in captions] == [again.read(n) for n in captions]
