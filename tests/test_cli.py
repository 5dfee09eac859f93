"""argv -> args: the order of the layers, what each mistake is answered with, and the help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer import cli
from trainer.cli import CommandError, parse


def parsed(*argv: str) -> cli.TrainArgs:
    args = parse(argv).args
    assert args is not None
    return args


def test_flags_beat_the_file_which_beats_the_preset(tmp_path: Path) -> None:
    preset = json.loads((cli.PRESETS / "style.json").read_text())
    assert preset["adapter"]["rank"] == 16
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"adapter": {"rank": 5, "alpha": 2}, "data": {"source": "from file"}}))
    args = parsed(str(file), "--preset", "style", "--adapter.alpha", "3")
    assert (args.adapter.rank, args.adapter.alpha) == (5, 3.0)
    assert args.adapter.targets == preset["adapter"]["targets"]
    assert args.data.source == "from file"
    assert parsed(str(file), "pictures").data.source == "pictures"
    assert parsed(str(file), "pictures", "--data.source", "flag").data.source == "flag"


def test_a_preset_by_its_bare_name() -> None:
    assert parsed("style", "pictures") == parsed("--preset", "style", "--data.source", "pictures")


def test_flags_may_stand_before_between_and_after() -> None:
    one = parsed("--adapter.rank", "3", "object", "--data.flip", "pictures", "--runtime.seed=9")
    assert (one.adapter.rank, one.data.flip, one.data.source, one.runtime.seed) == (3, True, "pictures", 9)
    assert not parsed("object", "pictures", "--no-data.flip").data.flip


def test_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER", '{"rank": 3}')
    monkeypatch.setenv("ADAPTER__RANK", "3")
    args = parsed(
        *("--data.source", "x", "--sample.prompts", "a TOK, on red", "--sample.prompts", "b"),
        *("--sample.strengths", "0.5,0.7", "--optim.adapter.betas", "0.8,0.9"),
    )
    assert args.sample.prompts == ("a TOK, on red", "b")
    assert args.sample.strengths == (0.5, 0.7)
    assert args.optim.adapter.betas == (0.8, 0.9)
    assert args.adapter.rank == 8, "the environment is not read"
    assert parsed("object", "x", "--sample.prompts", '["a, b", "c"]').sample.prompts == ("a, b", "c")
    assert parsed("object", "x", "--sample.prompts", "{trigger}").sample.prompts == ("{trigger}",)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("object", "x", "--adapter.rnak", "3"), "adapter.rnak is not an option; did you mean adapter.rank?"),
        (("object", "x", "--adapter.rnak=3"), "adapter.rnak is not an option; did you mean adapter.rank?"),
        (("object", "x", "--rank", "3"), "rank is not an option; did you mean adapter.rank?"),
        (("object", "x", "--adapter.lr", "3"), "adapter.lr is not an option; did you mean optim.adapter.lr?"),
        (("object", "x", "--zzzqqq", "3"), "zzzqqq is not an option; --help lists them all"),
        (("--resum", "x"), "--resum is not an option; did you mean --resume?"),
        (("object", "x", "y"), "'y' is one word too many"),
        (("objct", "x"), "there is no preset 'objct'; did you mean object? (presets: face, object, "),
        (("mine.json", "x"), "there is no args file 'mine.json'"),
        (("object",), "data.source is required"),
        ((), "nothing to do"),
        (("object", "x", "--adapter.rank"), "--adapter.rank: expected one argument"),
        (
            ("object", "x", "--adapter.rank", "0"),
            "adapter.rank: input should be greater than or equal to 1 (given: '0')",
        ),
        (("object", "x", "--model.dtype", "fp64"), "model.dtype: input should be 'fp32', 'bf16' or 'fp16'"),
        (("object", "x", "--sample.prompts", "[broken"), "sample.prompts"),
        (("object", "x", "--adapter.kind", "none", "--text.tokens", "0"), "nothing would be trained"),
        (("object", "x", "--adap", "3"), "is not an option"),
        (("object", "x", "--data.repeats", "dogs"), "--data.repeats takes name=value, with commas between several, or"),
        (("object", "x", "--data.concepts=dogs"), "or a JSON object (given: 'dogs')"),
        (("object", "x", "--data.concepts", '{"dog": {"mode": "style"}}'), "data.concepts.dog.trigger is required"),
        (("object", "x", "--data.concepts", '{"dog": {"trigr": "A"}}'), "data.concepts.dog.trigr is not an option"),
        (
            ("object", "x", "--data.concepts", '{"dog": {"trigger": "A", "mode": "object"}}'),
            "data.concepts.dog.mode is object, but data.concepts.dog.class_words names no word",
        ),
    ],
)
def test_mistakes_are_answered(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse(argv)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"adapter": {"rnak": 3}}', "adapter.rnak is not an option; did you mean adapter.rank?"),
        ('{"rank": 3}', "rank is not an option; did you mean adapter.rank?"),
        ('{"adaptor": {"rank": 3}}', "adaptor is not an option"),
        ('{"adapter": 3}', "adapter: "),
        ('{"a": ', "is not JSON"),
        ("[1]", "must hold a JSON object"),
        ("\xff", "cannot be read"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CommandError) as caught:
        parse((str(file), "pictures"))
    assert said in str(caught.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(CommandError) as caught:
        parse(("object", "x", "--adapter.rank", "0", "--runtime.steps", "x"))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["adapter.rank", "runtime.steps"]


def test_help_lists_every_option_with_its_line_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(("--help",))
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, field in cli.options().items():
        assert f"--{name}" in said
        line = " ".join((field.description or "").split())
        assert line in said, name
        after = said.split(line, 1)[1]
        assert "[default: " in line or after.startswith((" [default: ", " (required)")), name
    assert "[default: 8]" in said
    assert "lambda" not in said


def test_resume_alone_and_with_flags(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    args = parsed("object", "pictures", "--adapter.rank", "4")
    (run / "args.json").write_text(args.model_dump_json())
    plain = parse(("--resume", str(run)))
    assert (plain.args, plain.resume) == (None, run)
    changed = parse(("--resume", str(run), "--sample.every", "7")).args
    assert changed is not None
    assert changed.model_dump() == {**args.model_dump(), "sample": {**args.sample.model_dump(), "every": 7}}


@pytest.mark.parametrize("preset", ["object", "style", "face"])
def test_presets_are_valid_and_print(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.__main__ import main

    assert main([preset, "pictures", "--print-args"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert cli.validate(printed) == parsed(preset, "pictures")
