"""The chain of stages: its order, the places that people may fill, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from preprocess import PreprocessError, Report, build
from preprocess.stages import STAGES, Setting, Stage, chain
from trainer.args import DataArgs, TrainArgs
from trainer.registry import PartError
from trainer.run import opened


class Loud(Stage):
    """Captions in capitals."""

    version = 7

    def __call__(self, report: Report, setting: Setting) -> Report:
        return replace(report, items=tuple(replace(item, caption=item.caption.upper()) for item in report.items))


class Greedy(Stage):
    def __call__(self, report: Report, setting: Setting) -> Report:
        return replace(report, items=report.items[:1])


class Lost(Stage):
    def __call__(self, report: Report, setting: Setting) -> Report:
        return None  # type: ignore[return-value]


HERE = "test_stages"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} dog")
    return folder


def built(source: Path, stages: dict[str, str]) -> Report:
    data = DataArgs.model_validate({"source": str(source), "stages": stages})
    return build(str(source), source.parent / "run", data, resolution=32, step=8)


@pytest.mark.parametrize(
    ("place", "caption", "where"),
    [
        ("before trigger", "TOK, A RED DOG", 4),
        ("after trigger", "TOK, A RED DOG", 5),
        ("trigger", "A RED DOG", 4),
        ("before dedupe", "TOK, A RED DOG", 1),
    ],
)
def test_a_stage_stands_where_it_is_put(source: Path, place: str, caption: str, where: int) -> None:
    spec = f"{HERE}:Loud"
    report = built(source, {place: spec})
    assert report.items[0].caption == caption
    line = (source.parent / "run" / "dataset.jsonl").read_text().splitlines()[0]
    names = list(json.loads(line)["stages"].items())
    assert names[where] == (spec, 7)
    assert len(names) == 1 + len(STAGES) + (place != "trigger")


def test_the_shipped_chain_is_the_table() -> None:
    assert [link.name for link in chain({})] == list(STAGES)
    assert [link.name for link in chain({"mask": f"{HERE}:Loud", "after mask": f"{HERE}:Greedy"})] == [
        "dedupe", "regular", "caption", "trigger", f"{HERE}:Loud", f"{HERE}:Greedy", "upscale", "bucket",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"before captoin": f"{HERE}:Loud"}, "names the place 'before captoin'; did you mean before caption?"),
        ({"during mask": f"{HERE}:Loud"}, "names the place 'during mask' (allowed: one of dedupe, regular,"),
        ({"before mask": f"{HERE}:chain"}, "'test_stages:chain' is no subclass of preprocess.stages.Stage"),
        ({"before mask": f"{HERE}:Luod"}, "has no 'Luod'; did you mean Loud?"),
        ({"before mask": "sharpen"}, "data.stages 'before mask' 'sharpen' is unknown"),
    ],
)
def test_what_is_no_stage_is_refused(stages: dict[str, str], message: str) -> None:
    with pytest.raises(PartError) as error:
        chain(stages)
    assert message in str(error.value)


def test_a_stage_that_leaves_too_few_or_nothing_is_named(source: Path) -> None:
    with pytest.raises(PreprocessError, match="the stage test_stages:Greedy left 1 pictures, and at least 2 are need"):
        built(source, {"after mask": f"{HERE}:Greedy"})
    with pytest.raises(PreprocessError, match="'test_stages:Lost' gave a NoneType, and must give a Report"):
        built(source, {"after mask": f"{HERE}:Lost"})


def test_own_stages_are_refused_where_code_is(source: Path, tiny_base: Path, tmp_path: Path) -> None:
    args = TrainArgs.model_validate(
        {
            "data": {"source": str(source), "stages": {"before mask": "nowhere.py:Thing"}},
            "model": {"base": str(tiny_base)},
            "runtime": {"out": str(tmp_path), "device": "cpu"},
        }
    )
    with (
        pytest.raises(PartError, match=r"'nowhere\.py:Thing' would import code, which is refused here"),
        opened(args, code=False),
    ):
        pass
