"""How right the captions of the clip captioner are, attribute by attribute: python -m bench.captions.

Renderings of every held-out concept, and of the shapes that the vocabulary names, are captioned on the shipped base
and compared with what was rendered. Writes bench/results/captions.json, and from it a table of
docs/caption-accuracy.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.quality import SHOWN
from preprocess.captioners.clip import Clip, Filled
from preprocess.captioners.vocabulary import Vocabulary, read_vocabulary
from testbed.concepts import CONCEPTS, simple_scene, training_scenes
from testbed.pictures import PLACES, Scene, render
from trainer import console
from trainer.args import CaptionModelArgs

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench/results", ROOT / "docs/caption-accuracy.md"
KNOWN = "shapes in the vocabulary"
SEED, PART = 100, 50
ATTRIBUTES = ("colour", "background", "size", "fill", "place")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.captions", description="Accuracy of the clip captioner.")
    parser.add_argument("--pictures", type=int, default=200, help="of each concept")
    parser.add_argument("--only-page", action="store_true", help="make the tables from the results there are")
    args = parser.parse_args()
    console.hush_libraries()
    torch.set_num_threads(1)
    if not args.only_page:
        results = {"seed": SEED, "pictures": args.pictures, "right": accuracies(args.pictures)}
        (RESULTS / "captions.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(accuracy_table())
    return 0


def accuracies(n: int) -> dict[str, dict[str, float]]:
    """Concept -> attribute -> share in 0..1 of n captions. A fill that is the concept itself is not counted."""
    captioner = Clip(CaptionModelArgs(device="cpu"))
    meaning = meanings(read_vocabulary(ROOT / "testbed/base/clip/vocabulary.json"))
    right: dict[str, dict[str, float]] = {}
    with captioner.loaded() as write:
        for name in (*CONCEPTS, KNOWN):
            scenes, pictures = rendered(name, n)
            texts = [text for at in range(0, n, PART) for text in write([], pictures[at : at + PART])]
            said = [meaning[text] for text in texts]
            kind = CONCEPTS[name].kind if name in CONCEPTS else None
            right[name] = {
                attribute: sum(one[attribute] == truth(s)[attribute] for one, s in zip(said, scenes, strict=True)) / n
                for attribute in ATTRIBUTES
                if attribute != kind
            }
    return right


def rendered(name: str, n: int) -> tuple[list[Scene], list[Image.Image]]:
    """Scenes as a concept's training pictures have them, of another seed than those."""
    if name in CONCEPTS:
        scenes = training_scenes(CONCEPTS[name], n, SEED)
    else:
        rng = np.random.default_rng((SEED, 1))
        scenes = [simple_scene(rng, fills=("flat", "flat", "striped", "gradient")) for _ in range(n)]
    rng = np.random.default_rng((SEED, 4))
    return scenes, [render(scene, rng) for scene in scenes]


def meanings(vocabulary: Vocabulary) -> dict[str, dict[str, str]]:
    """Every caption that can be written -> the phrase of each slot that it names."""
    template = vocabulary.write or vocabulary.compare
    slots = {name: phrases for name, phrases in vocabulary.slots.items() if f"{{{name}}}" in template}
    whole = (Filled(phrases) for phrases in itertools.product(*slots.values()))
    return {one.text(template, slots): dict(zip(slots, one.phrases, strict=True)) for one in whole}


def truth(scene: Scene) -> dict[str, str]:
    thing = scene.things[0]
    return {
        "colour": thing.colour,
        "background": scene.background[0],
        "size": thing.size if thing.size != "medium" else "",
        "fill": thing.fill if thing.fill != "flat" else "",
        "place": PLACES.get(thing.position, ""),
    }


def page(text: str) -> str:
    """The page with the tables between its marks made anew."""
    tables: dict[str, Callable[[], str]] = {"accuracy": accuracy_table, "training": training_table}
    for name, table in tables.items():
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text)
    return text


def accuracy_table() -> str:
    right: dict[str, dict[str, float]] = _results("captions.json")["right"]
    rows = [[name, *(f"{shares[a]:.2f}" if a in shares else "" for a in ATTRIBUTES)] for name, shares in right.items()]
    return _table(["", *ATTRIBUTES], rows)


def training_table() -> str:
    """Both ways of captioning with the same seeds, and the second less the first in points."""
    methods: dict[str, Any] = _results("quality-captions.json")["tables"]["captions"]
    true, read = methods["true captions"], methods["captions by clip"]
    rows: list[list[str]] = []
    for name, result in (("captions as they come", true), ("captions by clip", read)):
        spans = [[run[key] for run in result["runs"]] for key in SHOWN]
        means = [result["mean"][key] for key in SHOWN]
        rows.append([name, *(f"{m:.2f} ({min(v):.2f}..{max(v):.2f})" for m, v in zip(means, spans, strict=True))])
    rows.append(["points between", *(f"{100 * (read['mean'][k] - true['mean'][k]):+.1f}" for k in SHOWN)])
    return _table(["", *(name.replace("_", " ") for name in SHOWN)], rows)


def _results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    sys.exit(main())
