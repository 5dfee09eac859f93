"""What the pages say is so: their example works, and they name what is there."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import captions, tables
from preprocess import build
from trainer.args import DataArgs, TrainArgs
from trainer.hooks import Hook
from trainer.run import opened
from trainer.rundir import RunDir

ROOT = Path(__file__).parents[1]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_hook_of_adding_a_part_trains(tmp_path: Path, tiny_base: Path, tiny_pictures: Path) -> None:
    match = re.search(r"```python\n# (?P<file>\w+\.py)\n(?P<code>.*?)```", page("docs/adding-a-part.md"), re.DOTALL)
    assert match
    file = tmp_path / match["file"]
    file.write_text(match["code"], encoding="utf-8")
    args = TrainArgs.model_validate(
        {
            "data": {"source": str(tiny_pictures), "resolution": 32},
            "model": {"base": str(tiny_base)},
            "sample": {"steps": 1},
            "hooks": {"tensorboard": False, "extra": [f"{file}:Largest"]},
            "runtime": {"out": str(tmp_path), "steps": 2, "batch_size": 2, "device": "cpu"},
        }
    )
    with opened(args) as session:
        assert [step.step for step in session.steps()] == [1, 2]
        largest = max(p.detach().abs().max().item() for _, p in session.run.components["adapter"])
    logged = [json.loads(line)["extra"]["largest_adapter"] for line in session.dir.metrics.read_text().splitlines()]
    assert len(logged) == 2
    assert 0 < logged[0] < 2 * largest


def test_the_masker_of_adding_a_part_masks(tmp_path: Path) -> None:
    match = re.search(r"```python\n# (?P<file>bright\.py)\n(?P<code>.*?)```", page("docs/adding-a-part.md"), re.DOTALL)
    assert match
    file = tmp_path / match["file"]
    file.write_text(match["code"], encoding="utf-8")
    source = tmp_path / "pictures"
    source.mkdir()
    for name, grey in (("a", 200), ("b", 90), ("c", 20)):
        picture = Image.new("RGB", (32, 32), (grey, grey, grey))
        picture.paste((0, 0, 0), (0, 0, 16, 32))
        picture.save(source / f"{name}.png")
    mask = {"sources": [f"{file}:Bright"], "threshold": 0.5}
    data = DataArgs.model_validate({"source": str(source), "masks": True, "mask": mask})
    items = build(str(source), tmp_path / "run", data, resolution=32, step=8).items
    assert [item.mask is not None for item in items] == [True, False, False]
    with Image.open(tmp_path / "run" / str(items[0].mask)) as found:
        assert (found.getpixel((8, 16)), found.getpixel((24, 16))) == (0, 255)


def test_the_stage_of_adding_a_part_leaves_pictures_out(tmp_path: Path) -> None:
    match = re.search(r"```python\n# (?P<file>plain\.py)\n(?P<code>.*?)```", page("docs/adding-a-part.md"), re.DOTALL)
    assert match
    file = tmp_path / match["file"]
    file.write_text(match["code"], encoding="utf-8")
    source = tmp_path / "pictures"
    source.mkdir()
    for name, colour in (("a", "red"), ("b", "white"), ("c", "blue")):
        picture = Image.new("RGB", (32, 32), colour)
        picture.paste("black" if name != "b" else "snow", (0, 0, 16, 32))
        picture.save(source / f"{name}.png")
    spec = f"{file}:Plain"
    data = DataArgs.model_validate({"source": str(source), "stages": {"before caption": spec}})
    report = build(str(source), tmp_path / "run", data, resolution=32, step=8)
    assert [item.source for item in report.items] == ["a.png", "c.png"]
    assert [(skip.file, skip.reason) for skip in report.skipped] == [("b.png", "it is nearly of one colour")]
    line = json.loads((tmp_path / "run" / "dataset.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert list(line["stages"])[1:5] == ["dedupe", "regular", spec, "caption"]


def test_the_optimizer_and_the_curve_of_the_optimizers_page_train(
    tmp_path: Path, tiny_base: Path, tiny_pictures: Path
) -> None:
    """And its rules: they match, they are told of, and what they freeze stays as it was."""
    match = re.search(r"```python\n# (?P<file>own\.py)\n(?P<code>.*?)```", page("docs/optimizers.md"), re.DOTALL)
    rules = re.search(r"```json\n(?P<tree>.*?)```", page("docs/optimizers.md"), re.DOTALL)
    assert match
    assert rules
    file = tmp_path / match["file"]
    file.write_text(match["code"], encoding="utf-8")
    own = {"name": f"{file}:get_optimizer", "curve": f"{file}:get_scheduler", "lr": 0.5, "options": {"momentum": 0.5}}
    args = TrainArgs.model_validate(
        {
            "data": {"source": str(tiny_pictures), "resolution": 32},
            "model": {"base": str(tiny_base)},
            "optim": {"adapter": own, **json.loads(rules["tree"])["optim"]},
            "sample": {"steps": 1},
            "hooks": {"tensorboard": False},
            "runtime": {"out": str(tmp_path), "steps": 4, "batch_size": 2, "device": "cpu"},
        }
    )
    with opened(args) as session:
        assert {group["momentum"] for group in session.run.optimizers["adapter"].param_groups} == {0.5}
        middle = [p for n, p in session.run.components["adapter"] if n.startswith("mid_block") and "attn2" not in n]
        states = [[p.detach().clone() for p in middle]]
        lr: list[float] = []
        for step in session.steps():
            states.append([p.detach().clone() for p in middle])
            lr.append(step.lr["adapter"])
    assert lr == [0.5, 0.5, 0.05, 0.05]
    same = [all(map(torch.equal, a, b)) for a, b in pairwise(states)]
    assert same == [False, False, True, True]
    assert "rule mid_block: trained from 0% to 50% of the run" in session.dir.log.read_text(encoding="utf-8")


def test_the_run_directory_page_names_every_path() -> None:
    run = RunDir(Path("R"))
    paths = [value for name in vars(RunDir) if isinstance(value := getattr(run, name), Path) and value != run.root]
    assert len(paths) > 10
    assert not [path for path in paths if path.name not in page("docs/run-directory.md")]


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/architecture.md",
        "docs/adding-a-part.md",
        "docs/caption-accuracy.md",
        "docs/cog.md",
        "docs/run-directory.md",
        "docs/hooks.md",
        "docs/masks.md",
        "docs/optimizers.md",
        "docs/pictures.md",
        "docs/concepts.md",
        "docs/several-processes.md",
        "docs/sampling.md",
        "docs/objectives.md",
    ],
)
def test_paths_and_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"<!--.*?-->", "", page(name), flags=re.DOTALL)
    links = [ROOT / name / ".." / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    files = [
        ROOT / found for found in re.findall(r"`((?:trainer|preprocess|tests|testbed|docs|presets)/[\w./-]*)`", text)
    ]
    assert not [str(path) for path in links + files if not path.resolve().exists()]


def test_the_tables_of_the_captions_page_are_those_of_the_results() -> None:
    text = page("docs/caption-accuracy.md")
    assert captions.page(text) == text
    assert captions.page(text.replace("| mushroom | 0.", "| mushroom | 1.")) == text
    methods = json.loads(page("bench/results/quality-captions.json"))["tables"]["captions"]
    seeds = [[run["seed"] for run in methods[name]["runs"]] for name in ("true captions", "captions by clip")]
    assert seeds == [[0, 1, 2], [0, 1, 2]]  # a difference is of the same seeds


def test_the_tables_of_the_benchmarks_are_those_of_the_results() -> None:
    assert tables.main(["--check"]) == 0
    text = page("docs/benchmarks.md")
    assert tables.page(text.replace("| before training | 0.", "| before training | 9.")) == text
    assert text.count("<!-- end -->") == len(re.findall(f"<!-- (?:{'|'.join(tables.KINDS)}) ", text))


def test_the_examples_of_the_hooks_page_do_what_they_say(tmp_path: Path, tiny_base: Path, tiny_pictures: Path) -> None:
    text = page("docs/hooks.md")
    match = re.search(r"```python\n# (?P<file>fade\.py)\n(?P<code>.*?)```", text, re.DOTALL)
    middle = re.search(r"```python\n# (?P<file>middle\.py)\n(?P<code>.*?)```", text, re.DOTALL)
    written = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert match
    assert middle
    assert written
    for example in (match, middle):
        (tmp_path / example["file"]).write_text(example["code"], encoding="utf-8")
    (use,) = json.loads(written[1])["hooks"]["extra"]
    use = {"use": f"{tmp_path}/{use['use']}", "options": {**use["options"], "every": 1}}
    args = TrainArgs.model_validate(
        {
            "data": {"source": str(tiny_pictures), "resolution": 32},
            "model": {"base": str(tiny_base)},
            "optim": {"adapter": {"lr": 1e-3}},
            "sample": {"steps": 1},
            "hooks": {"tensorboard": False, "extra": [use, f"{tmp_path}/middle.py:Middle"]},
            "runtime": {"out": str(tmp_path), "steps": 2, "batch_size": 2, "device": "cpu"},
        }
    )
    with opened(args) as session:
        steps = list(session.steps())
    assert [step.lr["adapter"] for step in steps] == [1e-3, 5e-4]
    assert steps[1].extra["middle_passes"] == steps[0].extra["middle_passes"] + 1 > 1


def test_the_hooks_page_has_every_event() -> None:
    rows = set(re.findall(r"^\| `(\w+)\(", page("docs/hooks.md"), re.MULTILINE))
    named = {name for name in vars(Hook) if name.startswith("on_")} | {"wants_stop", "close"}
    assert rows == named
