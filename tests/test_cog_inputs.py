"""Cog's inputs: the lines are those of the args, literal, and mean what they say; the schema refuses what Cog drops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer import callers, cli, cog_door, cog_inputs, cog_schema
from trainer.args import TrainArgs

ROOT = Path(__file__).parents[1]
URL = '["http://example.com/x.zip"]'


def args_of(**given: Any) -> TrainArgs:
    return cli.validate(cog_door.tree({"input_images": URL, **given}))


def test_the_lines_are_those_of_the_args() -> None:
    assert cog_inputs.main(["--check"]) == 0


def test_a_stale_line_is_found_and_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train.py", "predict.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("ge=1", "ge=2"), encoding="utf-8")
    monkeypatch.setattr(cog_inputs, "ROOT", tmp_path)
    assert cog_inputs.main(["--check"]) == 1
    assert cog_inputs.main(["--write"]) == 0
    assert (tmp_path / "train.py").read_text() == (ROOT / "train.py").read_text()
    assert cog_inputs.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("names", "option", "value"),
    [
        (("trigger_word", "token_string"), "data.trigger", "KIT"),
        (("autocaption_prefix", "caption_prefix"), "data.prefix", "a photo of {trigger}, "),
        (("autocaption_suffix",), "data.suffix", ", in a garden"),
        (("captioner",), "data.captioner", "blip"),
        (("steps", "max_train_steps"), "runtime.steps", 7),
        (("learning_rate", "lora_lr"), "optim.adapter.lr", 0.5),
        (("ti_lr",), "optim.rows.lr", 0.25),
        (("optimizer",), "optim.adapter.name", "prodigy"),
        (("batch_size", "train_batch_size"), "runtime.batch_size", 3),
        (("lora_rank",), "adapter.rank", 5),
        (("base_model",), "model.base", "owner/name"),
        (("gradient_checkpointing",), "model.gradient_checkpointing", True),
        (("caption_dropout_rate",), "data.caption_dropout", 0.5),
        (("seed",), "runtime.seed", 9),
        (("checkpointing_steps",), "runtime.checkpoint_every", 11),
        (("n_sample_imgs",), "sample.pictures", 6),
    ],
)
def test_names_that_people_script_against(names: tuple[str, ...], option: str, value: object) -> None:
    for name in names:
        found: Any = args_of(**{name: float(value) if type(value) is int else value})  # Cog may hand 7 as 7.0
        for part in option.split("."):
            found = getattr(found, part)
        assert found == value, name
    if len(names) == 2:
        assert args_of(**dict.fromkeys(names, value)), "one value under both names is no contradiction"
        with pytest.raises(ValueError, match="two names for one thing"):
            args_of(**{names[0]: value, names[1]: f"{value}1"})


def test_every_flat_input_is_tested() -> None:
    """Of those that stand for options; the list above and resolution below."""
    marks: Any = test_names_that_people_script_against.pytestmark  # pyright: ignore
    tested = {name for names, _, _ in marks[0].args[1] for name in names} | {"resolution"}
    assert tested == set(cog_inputs.names())


@pytest.mark.parametrize(
    ("given", "sides"), [(512, (512,)), (512.0, (512,)), ("512", (512,)), ("512,768, 1024", (512, 768, 1024))]
)
def test_resolution_is_a_number_or_several(given: object, sides: tuple[int, ...]) -> None:
    assert args_of(resolution=given).data.resolution == sides


def test_inputs_that_stand_for_several_options() -> None:
    assert args_of(autocaption=True).data.captioner == "florence2"
    assert args_of(autocaption=True, captioner="blip").data.captioner == "blip"
    assert args_of(autocaption=False).data.captioner == "sidecar"
    with pytest.raises(ValueError, match="autocaption is off"):
        args_of(autocaption=False, captioner="blip")
    clipseg = json.dumps({"data": {"mask": {"base": "clipseg"}}})
    masked = args_of(mask_target_prompts="a hat", args=clipseg).data
    assert (masked.masks, masked.mask.text, masked.mask.sources[-1]) == (True, "a hat", "text")
    assert "face" in args_of(mask_target_prompts="a hat", args=clipseg, concept_mode="face").data.mask.sources
    with pytest.raises(ValueError, match="CLIPSeg"):
        args_of(mask_target_prompts="a hat")


def test_args_reach_everything_and_contradict_nothing() -> None:
    args = args_of(concept_mode="style", args='{"adapter": {"alpha": 3}, "optim": {"rows": {"warmup": 0.1}}}')
    assert (args.adapter.rank, args.adapter.alpha, args.optim.rows.warmup) == (16, 3.0, 0.1), "and the preset's rank"
    assert args_of(lora_rank=4, args='{"adapter": {"rank": 4}}').adapter.rank == 4
    with pytest.raises(ValueError, match=r"lora_rank is 4, and args has adapter\.rank 8"):
        args_of(lora_rank=4, args='{"adapter": {"rank": 8}}')
    with pytest.raises(ValueError, match="not JSON"):
        args_of(args="{")
    with pytest.raises(ValueError, match="JSON object"):
        args_of(args="[1]")
    with pytest.raises(ValueError, match=r"did you mean adapter\.rank"):
        args_of(args='{"adapter": {"rnak": 3}}')


@pytest.mark.parametrize("given", ["/etc", "/etc/passwd", '["/etc"]', "~", '["http://a/x.zip", "/etc"]', "owner/data"])
def test_a_caller_names_no_file_of_the_server(given: str) -> None:
    with pytest.raises(ValueError, match="files of the server are not yours"):
        callers.source(given)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("x: int = Input(5)", "not named"),
        ("x: int = Input(default=LIMIT)", "literal"),
        ('x: str = Input(default="a", description=f"{1}")', "literal"),
        ("x: int = 5", r"Input\(\.\.\.\) only"),
        ("x: int", "needs an Input"),
        ("x: int = Input(default=None)", "makes it required"),
        ("x: Literal[1] = Input(default=1)", "no type"),
        ("x: CogPath = Input()", "no type"),
        ("x: int | str | None = Input(default=None, ge=1)", "no bounds on a union"),
        ("x: int = Input(default=1, gt=0)", "no gt"),
        ('x: str = Input(default="a", choices=["a"])', "both doors"),
    ],
)
def test_the_schema_refuses_what_cog_would_drop(line: str, why: str) -> None:
    train = f"class Made(BaseModel):\n    weights: Path\ndef train({line}) -> Made: ..."
    predict = 'def run(self, x: str = Input(choices=["b"], default="b")) -> list[Path]: ...'
    with pytest.raises(cog_schema.SchemaError, match=why):
        cog_schema.schema(train, predict)


def test_the_schema_says_what_the_lines_say() -> None:
    made = cog_schema.schema((ROOT / "train.py").read_text(), (ROOT / "predict.py").read_text())
    schemas = made["components"]["schemas"]
    given = schemas["TrainingInput"]["properties"]
    assert [name for name, one in sorted(given.items(), key=lambda pair: pair[1]["x-order"])] == list(given)
    assert given["lora_rank"] == given["lora_rank"] | {
        "type": "integer",
        "minimum": 1,
        "maximum": 1024,
        "nullable": True,
    }
    assert given["hf_token"]["x-cog-secret"] is True
    assert given["input_images"]["format"] == "uri"
    assert [shape["type"] for shape in given["resolution"]["anyOf"]] == ["integer", "string"]
    assert given["concept_mode"]["allOf"] == [{"$ref": "#/components/schemas/concept_mode"}]
    assert schemas["concept_mode"]["enum"] == ["object", "style", "face"]
    assert schemas["TrainingOutput"]["required"] == ["weights"]
    assert len(given) <= 31
