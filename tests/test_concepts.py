"""Several concepts in one run: each picture follows the trigger, the words and the captions of its own folder."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from diffusers import StableDiffusionPipeline
from small import items, noise

from preprocess import PreprocessError, build
from preprocess.survey import survey
from trainer import cli, concepts, export, generate
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import DataArgs, ModelArgs, TextArgs
from trainer.dataset import Item, Tags, read_manifest, varied
from trainer.models.sd15 import SD15
from trainer.rundir import RunDir

TWO: dict[str, Any] = {"dog": {"trigger": "TOK"}, "cat": {"trigger": "KIT"}}


def data(**options: Any) -> DataArgs:
    return cli.validate({"data": {"source": "x", **options}}).data


def draw(folder: Path, captions: dict[str, str | None], shade: int = 0) -> None:
    """A picture for each name; None leaves it without a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, caption) in enumerate(captions.items()):
        picture = noise((40, 40), 90, seed=crc32(name.encode())).convert("RGB")
        picture.point([min(255, v + shade + i) for v in range(256)] * 3).save(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    draw(root / "dog", {"d1": "a red dog", "d2": None, "d3": "a TOK"})
    draw(root / "cat", {"c1": "a cat on a mat", "c2": None})
    draw(root, {"top": "a tree", "bare": None})
    return root


def rows(source: Path, tmp_path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    build(str(source), tmp_path / "run", data(**options), 32, 16)
    lines = (tmp_path / "run/dataset.jsonl").read_text().splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


def test_captions_follow_the_folders_concept(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {
        "dog": {"trigger": "TOK", "mode": "object", "class_words": ["dog"], "caption": "one {trigger}"},
        "cat": {"trigger": "KIT", "mode": "style", "suffix": "by {trigger}"},
    }
    with caplog.at_level(logging.INFO, "preprocess"):
        made = rows(source, tmp_path, concepts=options, trigger="TREE", prefix="photo,")
    assert {name: row["caption"] for name, row in made.items()} == {
        "d1": "photo, a red TOK",
        "d2": "photo, one TOK",
        "d3": "photo, a TOK",
        "c1": "photo, a cat on a mat by KIT",
        "c2": "photo, a picture in the style of KIT by KIT",
        "top": "photo, TREE, a tree",
        "bare": "photo, a TREE",
    }
    triggers = {item.name: item.trigger for item in read_manifest(tmp_path / "run/dataset.jsonl")}
    assert triggers == {
        "d1": "TOK", "d2": "TOK", "d3": "TOK", "c1": "KIT", "c2": "KIT", "top": "TREE", "bare": "TREE"
    }  # fmt: skip


def test_the_survey_counts_each_concept(source: Path, tmp_path: Path) -> None:
    found = survey(build(str(source), tmp_path / "run", data(concepts=TWO, trigger="TREE"), 32, 16))
    for fact in (
        "3 pictures of TOK: folders dog",
        "2 pictures of KIT: folders cat",
        "2 pictures of TREE: folders .",
        "1 captions came without TOK: dog/d1.png",
        "1 captions came without KIT: cat/c1.png",
        "1 captions came without TREE: top.png",
    ):
        assert fact in found.facts


def test_a_misspelt_folder_is_named_with_the_nearest(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=r"'dogs', which has no pictures; did you mean dog\? \(folders: \., cat"):
        rows(source, tmp_path, concepts={"dogs": {"trigger": "TOK"}})


def test_mode_object_needs_words_for_pictures_outside_the_concepts(source: Path, tmp_path: Path) -> None:
    both = {folder: {"trigger": folder.upper(), "class_words": [folder]} for folder in ("dog", "cat")}
    with pytest.raises(PreprocessError, match=r"class_words names no word for bare\.png, top\.png"):
        rows(source, tmp_path, concepts=both, mode="object")


@pytest.mark.parametrize(
    ("options", "caption"),
    [
        ({}, "a TOK"),
        ({"mode": "style"}, "a picture in the style of TOK"),
        ({"mode": "style", "caption": "a {trigger}"}, "a TOK"),
        ({"mode": "face"}, "a TOK"),
    ],
)
def test_the_caption_of_a_picture_without_one(options: dict[str, Any], caption: str) -> None:
    assert data(**options).own_caption == caption


def pictures(*of: tuple[str, str, str]) -> list[Item]:
    """(folder, trigger, caption) each; no trigger makes a regular one."""
    made = items([(32, 32)] * len(of))
    return [
        replace(item, folder=folder, trigger=trigger, caption=caption, regular=not trigger)
        for item, (folder, trigger, caption) in zip(made, of, strict=True)
    ]


def test_class_words_are_those_of_each_pictures_concept() -> None:
    both = {
        "dog": {"trigger": "TOK", "class_words": ["dog", "hound"]},
        "cat": {"trigger": "KIT", "class_words": ["cat"]},
    }
    of = pictures(("dog", "TOK", "a TOK by a KIT"), ("cat", "KIT", "KITE, KIT"), ("reg", "", "a dog, TOKYO"))
    assert concepts.priors(data(concepts=both), of) == {
        "p0": ["a dog by a cat", "a hound by a cat"],
        "p1": ["KITE, cat"],
        "p2": ["a dog, TOKYO"],
    }
    with pytest.raises(concepts.ConceptError, match=r"there are none for 1 pictures \(p1\)"):
        concepts.priors(data(concepts={**both, "cat": "KIT"}), of)


def test_a_trigger_inside_another_is_no_match_of_its_own() -> None:
    both = {"a": {"trigger": "TOK", "class_words": ["dog"]}, "b": {"trigger": "TOK cat", "class_words": ["cat"]}}
    of = pictures(("a", "TOK", "a TOK"), ("b", "TOK cat", "a TOK cat"))
    assert concepts.priors(data(concepts=both), of) == {"p0": ["a dog"], "p1": ["a cat"]}


def test_prompts_write_triggers_out_and_cover_every_concept() -> None:
    of = pictures(*[("dog", "TOK", f"TOK {i}") for i in range(9)], ("cat", "KIT", "KIT 0"), ("cat", "KIT", "KIT 1"))
    both = data(concepts=TWO)
    assert concepts.prompts((), both, of) == ("TOK 0", "KIT 0", "TOK 1", "KIT 1")
    assert concepts.prompts(("a {trigger} by {trigger:cat}, KIT",), both, of) == ("a TOK by KIT, KIT",)
    with pytest.raises(concepts.ConceptError, match=r"no folder 'cats'; did you mean cat\?"):
        concepts.prompts(("{trigger:cats}",), both, of)
    alone = [replace(item, trigger="") for item in of]
    assert concepts.prompts((), data(), alone) == ("TOK 0", "TOK 1", "TOK 2", "TOK 3")


def test_pictures_outside_the_concepts_become_one() -> None:
    of = pictures(("dog", "TOK", "x"), ("rest", "TREE", "y"), ("reg", "", "z"))
    one = data(concepts={"dog": "TOK"}, trigger="TREE")
    done = concepts.filled(one, of)
    assert {folder: concept.trigger for folder, concept in done.concepts.items()} == {"dog": "TOK", "rest": "TREE"}
    assert done.triggers == ("TOK", "TREE")
    assert concepts.filled(done, of) == done
    assert concepts.filled(data(), of) == data()


def test_tags_are_left_out_at_the_asked_rate_and_never_the_trigger() -> None:
    caption = "photo, red, TOK dog, blue, green"
    shown = [varied(caption, Tags(1, dropout=0.3), "TOK", seed) for seed in range(600)]
    counts = Counter(part for text in shown for part in text.split(", "))
    assert counts["photo"] == counts["TOK dog"] == 600
    for tag in ("red", "blue", "green"):
        assert counts[tag] / 600 == pytest.approx(0.7, abs=0.06)
    assert all(parts == sorted(parts, key=caption.split(", ").index) for parts in (text.split(", ") for text in shown))
    assert shown == [varied(caption, Tags(1, dropout=0.3), "TOK", seed) for seed in range(600)]
    moved = [varied(caption, Tags(1, shuffle=True, dropout=0.3), "TOK", seed) for seed in range(600)]
    orders = {tuple(tag for tag in text.split(", ") if tag in ("red", "blue")) for text in moved}
    assert orders == {(), ("red",), ("blue",), ("red", "blue"), ("blue", "red")}


def family(base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(base)), torch.device("cpu"))


def test_each_trigger_has_rows_of_its_own_and_only_its_own_move(tiny_base: Path) -> None:
    on, options = family(tiny_base), TextArgs(tokens=2)
    single = TextualInversion(options, "KIT", seed=0)
    single.attach(on)
    start = single.rows()["text_encoder"].clone()
    single.detach()
    both = TextualInversion(options, [Concept("TOK"), Concept("KIT")], seed=0)
    [(name, rows)] = both.attach(on)
    assert (name, tuple(rows.shape), both.triggers) == ("text_encoder.rows", (4, 32), ("KIT", "TOK"))
    assert torch.equal(both.rows("KIT")["text_encoder"], start)
    assert on.expand("TOK, a KIT, KITE") == "<concept-2><concept-3>, a <concept-0><concept-1>, KITE"
    on.encode(["a TOK", "a star"]).hidden.square().sum().backward()
    assert rows.grad is not None
    assert (rows.grad != 0).any(dim=1).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="triggers that differ"):
        TextualInversion(options, [Concept("TOK"), Concept("TOK")], seed=0)


def test_each_concept_starts_from_its_own_words(tiny_base: Path) -> None:
    on = family(tiny_base)
    table = on.text_encoders["text_encoder"].get_input_embeddings().weight.detach()
    red, blue = (on.tokenizers["text_encoder"](w, add_special_tokens=False).input_ids[0] for w in ("red", "blue"))
    inversion = TextualInversion(
        TextArgs(tokens=2, init="words", init_words="red"), [Concept("B", "blue"), Concept("R")], seed=0
    )
    inversion.attach(on)
    assert torch.equal(inversion.rows()["text_encoder"], table[[blue, blue, red, red]])


def test_embeddings_load_in_diffusers_and_are_the_live_encoding(tiny_base: Path, tmp_path: Path) -> None:
    on = family(tiny_base)
    args = cli.validate(
        {"data": {"source": "x", "concepts": TWO}, "model": {"base": str(tiny_base)}, "text": {"tokens": 2}}
    )
    inversion = TextualInversion(args.text, [Concept("TOK"), Concept("KIT")], seed=3)
    inversion.attach(on)
    export.export(tmp_path, "run", on, [inversion], args)
    assert {path.name for path in tmp_path.iterdir()} == {
        "run_TOK_embedding.safetensors", "run_KIT_embedding.safetensors", "README.md", "run_comfyui.json"
    }  # fmt: skip
    note = (tmp_path / "README.md").read_text()
    for text in ("`TOK` (folder dog)", "`embedding:run_KIT_embedding` for `KIT`", "*a KIT*", "for each trigger"):
        assert text in note
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.float32)
    code = note.split("```python\n")[1].split("```")[0].strip().splitlines()
    for line in code:
        if "load_textual_inversion" in line:
            name, token = re.findall(r'"([^"]*)"', line)
            pipe.load_textual_inversion(tmp_path / name, token=token)
    expected, _ = pipe.encode_prompt("a <tok> on a red <kit>", torch.device("cpu"), 1, False)
    live = on.encode(["a TOK on a red KIT"]).hidden
    torch.testing.assert_close(live, expected)
    made = RunDir.create(tmp_path / "made")
    made.args.write_text(args.model_dump_json())
    made.export.mkdir()
    for file in tmp_path.glob("*.safetensors"):
        file.rename(made.export / file.name)
    weights = generate.find(made.root)
    assert set(weights.embeddings) == {"TOK", "KIT"}
    painter = generate.Painter(generate.base_of([weights]), torch.device("cpu"))
    painter.use([generate.Weighted(painter.read(weights))])
    painted = painter.family
    assert torch.equal(painted.encode(["a TOK on a red KIT"]).hidden, live)
    with pytest.raises(generate.GenerateError, match="there are 2 embeddings"):
        generate.find(made.root, trigger="X")
    assert set(generate.find(made.export / "run_TOK_embedding.safetensors", trigger="X").embeddings) == {"X"}


def test_file_names_differ_even_where_case_does_not_count() -> None:
    assert export.embedding_names("r", ["TOK"]) == {"TOK": "r_embedding"}
    named = export.embedding_names("r", ["TOK", "tok", "<a b>"])
    assert named == {"TOK": "r_TOK_embedding", "tok": "r_tok-2_embedding", "<a b>": "r_a_b_embedding"}
    assert export.names.diffusers_tokens(["TOK", "tok"]) == {"TOK": "<tok>", "tok": "<tok-2>"}
