"""The args tree: frozen, strict, with one sentence and a default for every option, and free of torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from trainer.args import TrainArgs
from trainer.cli import CommandError, default_of, options, parse, validate

MINIMAL = {"data": {"source": "pictures"}}


def test_it_is_frozen_and_forbids_unknown_keys() -> None:
    args = TrainArgs.model_validate(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        args.adapter.rank = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        TrainArgs.model_validate({**MINIMAL, "adapter": {"rnak": 4}})


def test_json_round_trip_is_exact() -> None:
    args = TrainArgs.model_validate(
        {**MINIMAL, "optim": {"rows": {"lr": 0.1 + 0.2}}, "sample": {"prompts": ["a, b"], "strengths": [0.3]}}
    )
    assert TrainArgs.model_validate_json(args.model_dump_json()) == args
    assert TrainArgs.model_validate(json.loads(json.dumps(args.model_dump(mode="json")))) == args


def test_every_option_has_one_line_and_a_default() -> None:
    names = options()
    assert len(names) > 50
    for name, field in names.items():
        assert field.description, name
        assert "\n" not in field.description, name
        assert field.is_required() or default_of(name) == field.get_default(call_default_factory=True), name
    assert [name for name, field in names.items() if field.is_required()] == ["data.source"]


def test_a_part_of_a_section_keeps_the_sections_other_defaults() -> None:
    args = TrainArgs.model_validate({"data": {"source": "pictures", "mask": {"feather": 0.5}}})
    usual = TrainArgs.model_validate(MINIMAL).data
    assert args.data == usual.model_copy(update={"mask": usual.mask.model_copy(update={"feather": 0.5})})


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"adapter": {"kind": "none"}}, "nothing would be trained"),
        ({"text": {"tokens": 1, "init": "words"}}, "init_words is empty"),
        ({"text": {"covariance_weight": 1}}, "covariance_weight is 1, but text.tokens is 0"),
        ({"text": {"condition_weight": 1}}, "condition_weight is 1, but text.tokens is 0"),
        ({"objective": {"t_min": 500, "t_max": 400}}, "must be below"),
        ({"objective": {"mask_floor": 0.1}}, "mask_floor is 0.1, but data.masks is off"),
        ({"objective": {"mask_prior": 1}}, "mask_prior is 1, but data.masks is off"),
        ({"objective": {"attention": {"weight": 1}}}, "attention.weight is 1, but data.masks is off"),
        ({"objective": {"attention": {"cell": 2}}}, "attention.cell is given, but attention.weight is 0"),
        ({"objective": {"mask_prior": 1, "mask_floor": 1}, "data": {"source": "x", "masks": True}}, "lower mask_floor"),
        ({"runtime": {"name": "../evil"}}, "pattern"),
        ({"runtime": {"name": "a/b"}}, "pattern"),
        ({"adapter": {"rank": 0}}, "greater than or equal to 1"),
        ({"optim": {"adapter": {"lr": 0}}}, "greater than 0"),
        ({"data": {"source": "x", "caption_dropout": 1.5}}, "less than or equal to 1"),
    ],
)
def test_bounds_and_contradictions(tree: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainArgs.model_validate({**MINIMAL, **tree})


def test_args_cli_registry_and_rundir_load_without_torch() -> None:
    code = "import sys, trainer.args, trainer.cli, trainer.registry, trainer.rundir, trainer.__main__; "
    code += "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("given", "sides", "saved"),
    [
        (512, (512,), 512),
        ("512", (512,), 512),
        ("512, 768,1024", (512, 768, 1024), [512, 768, 1024]),
        ([512, 768], (512, 768), [512, 768]),
        ([512], (512,), 512),
        (None, (), None),
    ],
)
def test_a_resolution_is_read_as_people_write_it(given: object, sides: tuple[int, ...], saved: object) -> None:
    args = TrainArgs.model_validate({"data": {"source": "pictures", "resolution": given}})
    assert args.data.resolution == sides
    tree = args.model_dump(mode="json")
    assert tree["data"]["resolution"] == saved
    assert TrainArgs.model_validate(tree) == args


@pytest.mark.parametrize("words", [["512"], ["512,768"], ["512", "--data.resolution=768"], ["[512, 768]"]])
def test_a_resolution_is_a_flag(words: list[str]) -> None:
    args = parse(["object", "pictures", "--data.resolution", *words]).args
    assert args
    assert args.data.resolution == ((512,) if words == ["512"] else (512, 768))


@pytest.mark.parametrize("given", ["", "512,", "512x768", 8, "5000", [512, 8], 0.5, {"side": 512}])
def test_what_is_no_resolution(given: object) -> None:
    with pytest.raises(CommandError, match=r"data\.resolution"):
        validate({"data": {"source": "pictures", "resolution": given}})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"augment": {"colour": 0.1}}, "variants is 0"),
        ({"augment": {"crop": 0.1}}, "variants is 0"),
        ({"augment": {"variants": 2}}, "colour and crop are 0"),
        ({"mode": "face", "flip": True}, "no face is symmetric"),
        ({"keep_sides": ["left"]}, "nothing is mirrored"),
        ({"flip": True, "keep_sides": ["left", " "]}, "empty word"),
        ({"flip": True, "concepts": {"ann": {"trigger": "ANN", "mode": "face"}}}, "no face is symmetric"),
        ({"caption_variants": 4}, "the caption as it is"),
    ],
)
def test_augmentation_that_would_do_nothing_or_harm_is_refused(data: dict[str, object], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        validate({"data": {"source": "pictures", **data}})


def test_augmentation_that_does_something_is_accepted() -> None:
    tree = {"source": "x", "flip": True, "keep_sides": ["left"], "augment": {"variants": 2, "crop": 0.1}}
    assert validate({"data": tree}).data.augment.variants == 2
