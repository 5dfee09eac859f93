"""The regularisation set: its captions are left alone, and its pictures are shown in turn with the concepts' own."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import items, latents
from test_concepts import draw

from preprocess import PreprocessError, Report, build
from preprocess.survey import survey
from trainer import cli, cog_door
from trainer.args import TrainArgs
from trainer.dataset import Dataset, Item
from trainer.mixture import repeated, weights
from trainer.run import opened, resumed


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    own, ordinary = tmp_path / "own", tmp_path / "ordinary"
    draw(own / "dog", {"d1": "a dog", "d2": None})
    draw(own / "cat", {"c1": "a cat", "c2": None}, shade=10)
    draw(ordinary / "dogs", {"d1": "a dog on grass", "r2": None, "r3": None}, shade=20)
    return own, ordinary


def made(sources: tuple[Path, Path], out: Path, caption: str | None = "a photo of a dog", **data: Any) -> Report:
    regular = {"source": str(sources[1]), **({} if caption is None else {"caption": caption})}
    tree = {"source": "x", "concepts": {"dog": "TOK", "cat": "KIT"}, "regularisation": regular, **data}
    return build(str(sources[0]), out, cli.validate({"data": tree}).data, 32, 16)


def test_no_trigger_is_put_into_their_captions(sources: tuple[Path, Path], tmp_path: Path) -> None:
    report = made(sources, tmp_path / "run", prefix="photo of {trigger},")
    rows = [json.loads(line) for line in (tmp_path / "run/dataset.jsonl").read_text().splitlines()]
    told = {row["name"]: (row["caption"], row["caption_from"]) for row in rows if row["regular"]}
    assert told == {
        "regular.d1": ("a dog on grass", "dogs/d1.txt"),
        "regular.r2": ("a photo of a dog", "data.regularisation.caption"),
        "regular.r3": ("a photo of a dog", "data.regularisation.caption"),
    }
    assert {row["source"] for row in rows if row["regular"]} == {
        f"regularisation/dogs/{n}.png" for n in ("d1", "r2", "r3")
    }
    assert {row["trigger"] for row in rows if row["regular"]} == {""}
    assert all(row["bucket"] == [32, 32] for row in rows)
    found = survey(report)
    assert found.pictures == 4
    assert "3 regularisation pictures" in found.facts
    assert not [fact for fact in found.facts if "came without" in fact and "regularisation" in fact]


def test_what_cannot_be_right_is_named(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        PreprocessError, match=r"2 regularisation pictures have no caption \(regularisation/dogs/r2\.png"
    ):
        made(sources, tmp_path / "run", caption=None)
    with pytest.raises(PreprocessError, match=r"name the trigger KIT \(regularisation/dogs/r2\.png, "):
        made(sources, tmp_path / "run", caption="a KIT")
    (sources[1] / "dogs/r3.txt").write_text("a dog\nby a TOK")
    with pytest.raises(PreprocessError, match=r"name the trigger TOK \(regularisation/dogs/r3\.png\)"):
        made(sources, tmp_path / "run", caption_lines=True)
    (sources[0] / "regularisation").mkdir()
    shutil.copy(sources[0] / "dog/d1.png", sources[0] / "regularisation/x.png")
    with pytest.raises(PreprocessError, match="give the folder another name"):
        made(sources, tmp_path / "run", dedupe="off")
    with pytest.raises(cli.CommandError, match="ratio would do nothing"):
        cli.validate({"data": {"source": "x", "regularisation": {"ratio": 2}}})


def test_a_training_picture_among_them_stays_with_a_note(sources: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(sources[0] / "dog/d1.png", sources[1] / "same.png")
    report = made(sources, tmp_path / "run")
    assert sum(item.regular for item in report.items) == 4
    [note] = [note for note in survey(report).problems if "regularisation" in note]
    assert note.startswith("regularisation/same.png: it is the same picture as dog/d1.png")


def test_a_copy_among_them_is_left_out(sources: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(sources[1] / "dogs/r2.png", sources[1] / "dogs/r4.png")
    report = made(sources, tmp_path / "run")
    [skip] = report.skipped
    assert (skip.file, "r2.png" in skip.reason) == ("regularisation/dogs/r4.png", True)
    assert sum(item.regular for item in made(sources, tmp_path / "off", dedupe="off").items) == 4


def mixed(own: int, regular: int, size: tuple[int, int] = (32, 32)) -> list[Item]:
    made = items([size] * (own + regular))
    return [replace(item, regular=i >= own, folder="." if i < own else "regularisation") for i, item in enumerate(made)]


@pytest.mark.parametrize(("own", "regular", "ratio"), [(3, 7, 1.0), (5, 2, 1.0), (4, 4, 0.5), (2, 9, 3.0)])
def test_showings_keep_the_ratio_and_leave_no_picture_out(own: int, regular: int, ratio: float) -> None:
    shown = repeated(mixed(own, regular), {}, balance=False, ratio=ratio)
    counts = Counter(item.name for item in shown)
    concept = sum(not item.regular for item in shown)
    assert len(shown) - concept == round(ratio * concept)
    ordinary = [counts[f"p{own + i}"] for i in range(regular)]
    assert min(ordinary) >= 1
    assert max(ordinary) - min(ordinary) <= 1
    assert len({counts[f"p{i}"] for i in range(own)}) == 1


def test_repeats_and_weights_work_with_them() -> None:
    of = mixed(2, 2)
    of[1], of[3] = replace(of[1], folder="cat"), replace(of[3], folder="regularisation/cat")
    shown = Counter(i.name for i in repeated(of, {"cat": 3, "regularisation/cat": 3}, balance=False))
    assert shown == {"p0": 1, "p1": 3, "p2": 1, "p3": 3}
    assert weights(of, {}) is None
    assert weights(of, {}, 0.5) == {"p0": 1.0, "p1": 1.0, "p2": 0.5, "p3": 0.5}
    assert weights(of, {"cat": 2, "regularisation/cat": 3}, 0.5) == {"p0": 1.0, "p1": 2.0, "p2": 0.5, "p3": 1.5}


def test_concept_pictures_are_spread_over_a_long_epoch() -> None:
    shown = repeated(mixed(2, 40), {}, balance=False)
    data = Dataset(shown, latents(shown), batch_size=4, seed=0)
    names = [name for i in range(20) for name in data.micro(i).names]  # an epoch of 80 showings
    assert Counter(names)["p0"] == Counter(names)["p1"] == 20
    for quarter in range(4):
        part = Counter(names[20 * quarter : 20 * quarter + 20])
        assert 3 <= part["p0"] <= 7
        assert 3 <= part["p1"] <= 7
    other = Dataset(shown, latents(shown), batch_size=4, seed=0)
    assert [other.micro(i).names for i in (33, 5, 19)] == [data.micro(i).names for i in (33, 5, 19)]


def args(base: Path, sources: tuple[Path, Path], out: Path, name: str) -> TrainArgs:
    tree = {
        "data": {
            "source": str(sources[0]),
            "concepts": {"dog": {"trigger": "TOK", "class_words": ["dog"]}, "cat": "KIT"},
            "class_words": ["animal"],
            "regularisation": {"source": str(sources[1]), "caption": "a dog", "weight": 0.5},
            "shuffle_tags": True,
            "tag_dropout": 0.2,
        },
        "model": {"base": str(base)},
        "adapter": {"rank": 2},
        "text": {"tokens": 1},
        "objective": {"prior_weight": 0.5},
        "sample": {"steps": 1, "strengths": []},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "name": name, "steps": 4, "batch_size": 2, "checkpoint_every": 2, "device": "cpu"},
    }
    return cli.validate(tree)


def test_two_concepts_and_a_regularisation_set_resume_to_the_last_bit(
    tiny_base: Path, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    with opened(args(tiny_base, sources, tmp_path, "whole")) as whole:
        samples = [whole.run.dataset.micro(i) for i in range(8)]
        list(whole.steps())
        assert whole.args.sample.prompts == ("KIT, a cat", "TOK, a dog", "a KIT", "a TOK")
    seen = Counter(name.startswith("regular.") for batch in samples for name in batch.names)
    assert seen == {True: 8, False: 8}
    for batch in samples:
        assert batch.weight is not None
        assert batch.weight.tolist() == [0.5 if name.startswith("regular.") else 1.0 for name in batch.names]
        for name, prior in zip(batch.names, batch.prior, strict=True):
            assert prior in {"d": ("dog, a dog", "a dog"), "c": ("animal, a cat", "a animal")}.get(
                name[0], ("a dog", "a dog on grass")
            )
    with opened(args(tiny_base, sources, tmp_path, "part")) as part:
        for step in part.steps():
            if step.step == 2:
                break
    with resumed(tmp_path / "part") as part:
        assert part.start == 2
        assert len(list(part.steps())) == 2
    for trigger in ("TOK", "KIT"):
        files = [tmp_path / n / f"export/{n}_{trigger}_embedding.safetensors" for n in ("whole", "part")]
        one, two = (load_file(file)["emb_params"] for file in files)
        assert torch.equal(one, two)
    kohya = [load_file(tmp_path / name / f"export/{name}.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(kohya[0][key], kohya[1][key]) for key in kohya[0])


def test_a_caller_of_the_server_reads_no_folder_of_it(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"input_images": tmp_path / "x.zip", "resolution": 32}
    inputs |= {"concept_mode": "object", "args": json.dumps({"data": {"regularisation": {"source": "/etc"}}})}
    with pytest.raises(cog_door.TrainingError, match=r"must be an http\(s\) URL"):
        cog_door.train(inputs)
