"""Several weights on one base: strengths as computed by hand, also by block; tokens; switching without a trace."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer import export, generate, predict_door, scratch, serve_door
from trainer.adapters import ADAPTERS
from trainer.adapters.layered import Layers
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import LimitsArgs, ModelArgs, TrainArgs
from trainer.generate import GenerateError, Look, Painter, Strength, Weighted, parse
from trainer.registry import load
from trainer.rundir import RunDir
from trainer.types import ModelFamily

CPU = torch.device("cpu")
BASES = ("tiny_base", "tiny_sdxl")
TEXT = {"train": True, "rank": 2, "targets": "attention+ff"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 1.0, "targets": "attention+ff+conv", "text": TEXT},
    "dora": {"kind": "dora", "rank": 2, "targets": "attention+ff+conv", "text": TEXT},
    "dora-rows": {"kind": "dora", "rank": 2, "axis": "output"},
    "loha": {"kind": "loha", "rank": 2},
    "lokr": {"kind": "lokr", "rank": 2},
    "oft": {"kind": "oft", "block": 8},
    "full": {"kind": "full", "targets": "all"},
}


def made(base: Path, folder: Path, name: str, kind: str | None = None, trigger: str = "", **text: Any) -> RunDir:
    """A run directory with exports of random weights, of a kind, of a trigger, or of both."""
    adapter = KINDS[kind] if kind else {"kind": "none"}
    tokens = {"tokens": 2, **text} if trigger else {}
    args = TrainArgs.model_validate(
        {
            "data": {"source": "x", "trigger": trigger or "TOK"},
            "model": {"base": str(base)},
            "adapter": adapter,
            "text": tokens,
            "runtime": {"name": name},
        }
    )
    family = Painter(args.model, CPU).family
    parts: list[Any] = []
    if trigger:
        parts.append(TextualInversion(args.text, [Concept(trigger)], seed=0))
    if kind:
        parts.append(load(ADAPTERS, args.adapter.kind, "adapter.kind")(args.adapter, seed=0))
        if args.adapter.text.train:
            parts.append(load(ADAPTERS, args.adapter.kind, "adapter.kind")(args.adapter.for_text(), 0, "text"))
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    for part in parts:
        for _, parameter in part.attach(family):
            change = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_((0.15 if isinstance(part, Layers) else 1.0) * change)
    run = RunDir.create(folder / name)
    run.args.write_text(args.model_dump_json())
    export.export(run.export, name, family, parts, args)
    return run


def painter_of(base: Path) -> Painter:
    return Painter(ModelArgs.model_validate({"base": str(base)}), CPU)


def weights_of(family: ModelFamily) -> dict[tuple[str, str], Tensor]:
    roots: dict[str, nn.Module] = {"denoiser": family.denoiser, **family.text_encoders}
    return {
        (name, path): parameter.detach().clone()
        for name, root in roots.items()
        for path, parameter in root.named_parameters()
    }


def pixels(painter: Painter, prompt: str = "a TOK", seed: int = 3) -> np.ndarray:
    (picture,) = painter.draw([prompt], [seed], Look(steps=2))
    return np.asarray(picture, dtype=np.int16)


def read(painter: Painter, run: RunDir) -> generate.Learned:
    return painter.read(generate.find(run.root))


@pytest.mark.parametrize("base", BASES)
def test_every_kind_adds_up_as_by_hand(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    kinds = list(KINDS) if base == "tiny_base" else ["lora", "dora", "loha"]
    runs = [made(folder, tmp_path, kind, kind) for kind in kinds]
    painter = painter_of(folder)
    learned = [read(painter, run) for run in runs]
    plain = weights_of(painter.family)
    changes: list[dict[tuple[str, str], Tensor]] = []
    for one in learned:
        painter.use([Weighted(one)])
        now = weights_of(painter.family)
        changes.append({key: now[key] - plain[key] for key in plain})
        assert any(change.any() for change in changes[-1].values())
    strengths = [0.8, -0.5, 1.3, 0.25, 2.0, 0.6, 0.4][: len(kinds)]
    painter.use([Weighted(one, Strength(s)) for one, s in zip(learned, strengths, strict=True)])
    for key, weight in weights_of(painter.family).items():
        expected = plain[key] + sum(s * change[key] for s, change in zip(strengths, changes, strict=True))
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    painter.use([])
    assert all(torch.equal(weight, plain[key]) for key, weight in weights_of(painter.family).items())


def test_a_lora_is_its_formula(tiny_base: Path, tmp_path: Path) -> None:
    painter, name = painter_of(tiny_base), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    key = f"lora_unet_{name.replace('.', '_')}"
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(3.0)}
    save_file(state, tmp_path / "style.safetensors")
    weight = painter.family.denoiser.get_submodule(name).get_parameter("weight")
    before = weight.detach().clone()
    painter.use([Weighted(painter.read(generate.find(tmp_path / "style.safetensors")), Strength(0.7))])
    torch.testing.assert_close(weight.detach(), before + 0.7 * 3.0 / 2 * up @ down, rtol=0, atol=1e-6)


def test_strengths_by_block_are_of_those_layers(tiny_base: Path, tmp_path: Path) -> None:
    painter = painter_of(tiny_base)
    learned = read(painter, made(tiny_base, tmp_path, "lora", "lora"))
    plain = weights_of(painter.family)
    painter.use([Weighted(learned)])
    full = {key: weight - plain[key] for key, weight in weights_of(painter.family).items()}
    said = ["0.8", "down=0.5", "down_blocks.1.attentions=0", "mid=2", "*.attn2=-1", "text=0.25"]
    painter.use([Weighted(learned, parse(said)[0])])
    seen: set[float] = set()
    for (component, path), weight in weights_of(painter.family).items():
        strength = 0.8
        if component != "denoiser":
            strength = 0.25
        elif path.startswith("down_blocks.1.attentions"):
            strength = 0.0
        elif path.startswith("down_blocks"):
            strength = 0.5
        elif path.startswith("mid_block"):  # as long a name as down_blocks.1.attentions is not here
            strength = 2.0
        elif ".attn2" in path:
            strength = -1.0
        seen |= {strength} if full[component, path].any() else set()
        expected = plain[component, path] + strength * full[component, path]
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)
    assert seen == {0.8, 0.25, 0.0, 0.5, 2.0, -1.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strong"], "'strong' says no strength"),
        (["down=x"], "'down=x' says no strength"),
        (["nan"], "'nan' says no strength"),
        (["1", "0.5"], r"the strength is given twice \(0.5\)"),
        (["mid=1", "mid=1"], r"mid is given twice"),
        (["=1"], "'=1' names no block"),
        (["trigger=A", "trigger=B"], "trigger is given twice"),
    ],
)
def test_a_strength_that_cannot_be_read_is_named(words: list[str], said: str) -> None:
    with pytest.raises(GenerateError, match=said):
        parse(words)


def test_what_would_do_nothing_or_clash_is_an_error_and_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    painter = painter_of(tiny_base)
    runs = [made(tiny_base, tmp_path, name, kind, "TOK") for name, kind in (("one", "lora"), ("two", None))]
    one, two = (read(painter, run) for run in runs)
    painter.use([Weighted(one)])
    first = pixels(painter)
    for weighted, said in (
        (
            [Weighted(one, Strength(1.0, {"down_blocks.7": 0.5}))],
            "one changes no layer in down_blocks.7.* denoiser.down",
        ),
        (
            [Weighted(read(painter, made(tiny_base, tmp_path, "bare", "lora")), Strength(tokens=1.0))],
            "no token vectors",
        ),
        ([Weighted(one), Weighted(two)], "one and two both stand for the trigger 'TOK'.*--weights two trigger=OTHER"),
    ):
        with pytest.raises(GenerateError, match=said):
            painter.use(weighted)
        assert np.array_equal(pixels(painter), first)
    other = painter.read(generate.find(runs[1].root, "KIT"))
    painter.use([Weighted(one), Weighted(other)])
    assert painter.family.expand("TOK, KIT") == "<concept-0><concept-1>, <concept-2><concept-3>"


@pytest.mark.parametrize("base", BASES)
def test_a_then_b_then_a_leaves_no_trace(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    painter = painter_of(folder)
    bare, table = pixels(painter), weights_of(painter.family)
    kinds = (("a", "dora", "TOK"), ("b", "lora", "KIT"), ("c", None, "TOK"))
    a, b, c = (read(painter, made(folder, tmp_path, name, kind, word)) for name, kind, word in kinds)
    painter.use([Weighted(a)])
    first = pixels(painter)
    for weighted in ([Weighted(b, Strength(0.5))], [Weighted(c)], [Weighted(a, Strength(-1.0)), Weighted(b)]):
        painter.use(weighted)
        assert not np.array_equal(pixels(painter), first)
    painter.use([Weighted(a)])
    assert np.array_equal(pixels(painter), first)
    painter.use([])
    assert np.array_equal(pixels(painter), bare)
    now = weights_of(painter.family)
    assert now.keys() == table.keys()
    assert all(torch.equal(now[key], table[key]) for key in table)
    assert painter.family.prompt_rules == []


@pytest.mark.parametrize("base", BASES)
def test_rows_are_blended_with_the_words_they_started_from(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    painter = painter_of(folder)
    one = read(painter, made(folder, tmp_path, "one", None, "TOK", tokens=1, init="words", init_words="flower"))
    three = read(painter, made(folder, tmp_path, "three", None, "KIT", tokens=3))
    plain = painter.family.encode(["a red flower on a square"])
    tables = {name: text.get_input_embeddings().weight for name, text in painter.family.text_encoders.items()}  # type: ignore
    means = {name: table.mean(dim=0) for name, table in tables.items()}

    painter.use([Weighted(one, Strength(0.0)), Weighted(three, Strength(0.0))])
    none = painter.family.encode(["a red TOK on a square"])
    assert torch.equal(none.hidden, plain.hidden)  # one vector, one word: the prompt with the word for the trigger
    for name, text in painter.family.text_encoders.items():
        rows = text.get_input_embeddings().rows  # type: ignore[union-attr]
        torch.testing.assert_close(rows[1:].detach(), means[name].expand(3, -1))

    painter.use([Weighted(one, Strength(0.25)), Weighted(three, Strength(2.0, tokens=0.5))])
    for name, text in painter.family.text_encoders.items():
        rows = text.get_input_embeddings().rows.detach()  # type: ignore[union-attr]
        trained = one.words["TOK"].rows[name]
        start = one.words["TOK"].start[name]
        torch.testing.assert_close(rows[:1], 0.75 * start + 0.25 * trained)
        torch.testing.assert_close(rows[1:], 0.5 * means[name] + 0.5 * three.words["KIT"].rows[name])
    painter.use([Weighted(one)])
    for name, text in painter.family.text_encoders.items():
        assert torch.equal(text.get_input_embeddings().rows.detach(), one.words["TOK"].rows[name])  # type: ignore


def test_embeddings_of_other_programs_are_read(tiny_base: Path, tmp_path: Path) -> None:
    painter, rows = painter_of(tiny_base), torch.ones(3, 32)
    save_file({"<cat-toy>": rows[0].clone()}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": rows}, tmp_path / "toy.safetensors")
    save_file({"clip_l": rows, "clip_g": torch.ones(3, 24)}, tmp_path / "xl.safetensors")
    read = [painter.read(generate.find(tmp_path / f"{name}.safetensors")) for name in ("learned_embeds", "toy")]
    assert [list(one.words) for one in read] == [["<cat-toy>"], ["toy"]]
    painter.use([Weighted(one) for one in read])
    assert painter.family.expand("a <cat-toy> toy") == "a <concept-0> <concept-1><concept-2><concept-3>"
    with pytest.raises(GenerateError, match=r"xl\.safetensors holds clip_g, clip_l; this base takes emb_params"):
        painter.read(generate.find(tmp_path / "xl.safetensors"))


def test_runs_of_different_bases_need_a_choice(tiny_base: Path, tiny_base_deep: Path, tmp_path: Path) -> None:
    found = [
        generate.find(made(base, tmp_path, name, "lora").root)
        for name, base in (("one", tiny_base), ("two", tiny_base_deep))
    ]
    with pytest.raises(GenerateError, match=r"one and two were trained on bases that differ \(model.base: .*--base"):
        generate.base_of(found)
    assert generate.base_of(found, str(tiny_base), "bf16").base == str(tiny_base)
    assert generate.base_of(found[1:]).base == str(tiny_base_deep)


# --- the command


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (folder / self.path.partition("?")[0].strip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def draw(*argv: object) -> int:
    try:
        return predict_door.main([str(word) for word in argv])
    except SystemExit as error:
        return int(str(error.code))


def test_several_from_urls_and_archives_in_a_grid(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    dog = made(tiny_base, tmp_path / "of=0.5", "dog", "lora", "TOK")
    style = made(tiny_base, tmp_path, "style", "lokr")
    with tarfile.open(tmp_path / "dog.tar", "w") as tar:
        tar.add(dog.args, "args.json")
        tar.add(dog.export, "export")
    out = tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a TOK\n\na red star\n")
    common = ("--out", out, "--steps", 2, "--device", "cpu", "--prompts", tmp_path / "prompts.txt")
    with served(tmp_path) as address:
        weights = ("--weights", f"{address}/dog.tar?key=SECRET", "1", "text=0.5")
        other = ("--weights", f"{address}/style/export/style.safetensors", "-0.5")
        assert draw(*weights, *common) == 2
        assert "inside a private network; --private-urls allows" in capsys.readouterr().err
        many = (*weights, *other, *common, "--private-urls", "--seed", 5, 9, "--grid", 0, 1, "--batch-size", 3)
        assert draw(*many) == 0
    assert list((tmp_path / "temporary").iterdir()) == []
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(path.name for path in out.iterdir())
    assert [name[5:] for name in names] == ["seed5.png", "seed9.png"] * 4 + ["grid.png"] * 2
    grid = Image.open(out / "0008_grid.png")
    assert grid.width > 2 * 128
    again = tmp_path / "again"
    local = ("--weights", dog.root, 1, "text=0.5", "--weights", style.root, "-0.5")
    assert draw(*local, "--prompt", "a TOK", "--out", again, "--steps", 2, "--seed", 9, "--device", "cpu") == 0
    alone, among = Image.open(again / "0000_seed9.png"), Image.open(out / "0005_seed9.png")
    assert abs(np.asarray(alone, np.int16) - np.asarray(among, np.int16)).max() <= 1
    assert Image.open(out / "0001_seed9.png").tobytes() != among.tobytes()

    said = json.loads(among.info["tempera"])
    assert "SECRET" not in among.info["tempera"]
    assert str(tmp_path) not in among.info["tempera"]
    assert (said["prompt"], said["seed"], said["scheduler"], said["width"]) == ("a TOK", 9, "ddim", 32)
    assert [(w["name"], w["strength"], w["blocks"], w["tokens"]) for w in said["weights"]] == [
        ("dog", 1.0, {"text": 0.5}, 1.0), ("style", -0.5, {}, -0.5)
    ]  # fmt: skip
    assert said["weights"][1]["files"].keys() == {"style.safetensors"}
    lines = among.info["parameters"].split("\n")
    assert lines[0] == "a TOK <lora:dog:1> <lora:style:-0.5>"
    assert lines[1].startswith("Steps: 2, Sampler: DDIM, Schedule type: Automatic, CFG scale: 3, Seed: 9, Size: 32x32")


def test_parameters_are_read_as_a1111_writes_them(tiny_base: Path, tmp_path: Path) -> None:
    """Its own pattern of a setting, and the line that holds what to avoid."""
    painter, look = painter_of(tiny_base), Look(negative="a square", scheduler="dpm++_2m_karras", guidance=4.5)
    said = generate.facts(painter, look, "a red star,\nlarge", 7, (32, 48))
    *prompt, negative, settings = generate.parameters({**said, "base": {**said["base"], "name": "a, b"}}).split("\n")
    assert (prompt, negative) == (["a red star,", "large"], "Negative prompt: a square")
    assert settings == (
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5, Seed: 7, Size: 32x48, "
        'Model: "a, b", Version: tempera'
    )


def test_a_picture_to_begin_with_and_a_mask(tiny_base: Path, tmp_path: Path) -> None:
    run = made(tiny_base, tmp_path, "dog", "lora", "TOK")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 32, 16))
    picture.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    common = (
        "--weights",
        run.root,
        "--prompt",
        "a TOK",
        "--steps",
        3,
        "--device",
        "cpu",
        "--image",
        tmp_path / "photo.png",
    )
    assert draw(*common, "--out", tmp_path / "whole", "--image-strength", 0.5) == 0
    assert draw(*common, "--out", tmp_path / "part", "--mask", tmp_path / "mask.png", "--scheduler", "euler_a") == 0
    part = Image.open(tmp_path / "part" / "0000_seed0.png")
    assert np.array_equal(np.asarray(part)[16:], np.asarray(picture)[16:])
    assert (np.asarray(part)[:16] != np.asarray(picture)[:16]).any()
    start = json.loads(part.info["tempera"])["start"]
    assert (start["strength"], list(start["files"])) == (1.0, ["photo.png", "mask.png"])
    whole = Image.open(tmp_path / "whole" / "0000_seed0.png")
    assert whole.size == (32, 40)
    assert "Denoising strength: 0.5" in whole.info["parameters"]


def test_options_that_cannot_be_are_named(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tiny_base, tmp_path, "dog", "lora")
    Image.new("RGB", (33, 32)).save(tmp_path / "odd.png")
    cases = [
        ((), "there is nothing to draw: give --prompt or --prompts"),
        (("--prompts", tmp_path / "none.txt"), "cannot be read as a list of prompts"),
        (("--prompt", "a", "--seed", 1, 2, "--n", 2), "--n counts on from one --seed"),
        (("--prompt", "a", "--seed", 1, 1), "--seed names one twice"),
        (("--prompt", "a", "--grid", 1, "--strength", 1), "--grid and --strength both say"),
        (("--prompt", "a", "--mask", "x.png"), "--mask is of a picture"),
        (("--prompt", "a", "--image-strength", 0.5), "does nothing without --image"),
        (("--prompt", "a", "--guidance", 1, "--negative", "b"), "guides nowhere"),
        (("--prompt", "a", "--scheduler", "eular"), "did you mean euler?"),
        (("--prompt", "a", "--width", 33), "33 x 32 pixels cannot be drawn"),
        (("--prompt", "a", "--image", tmp_path / "odd.png"), "take a width of 32 and a height of 32"),
        (("--prompt", "a", "--image", run.args), "is no picture that can be read"),
        (("--prompt", "a", "--batch-size", 0), "--batch-size is 0, and must be 1 or more"),
    ]
    for words, said in cases:
        assert draw("--weights", run.root, "--out", tmp_path / "out", "--device", "cpu", *words) == 2, words
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tar_that_leads_out_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w") as tar:
        (tmp_path / "x").write_text("x")
        tar.add(tmp_path / "x", arcname="../../escaped")
    with pytest.raises(GenerateError, match=r"bad\.tar cannot be unpacked"), generate.opened(str(bad)):
        pass
    limits = LimitsArgs.model_validate({"entries": 1})
    with tarfile.open(bad, "w") as tar:
        for name in ("a", "b"):
            tar.add(tmp_path / "x", arcname=name)
    with pytest.raises(GenerateError, match="holds more than 1 files"), generate.opened(str(bad), limits=limits):
        pass


def test_the_cog_doors_pictures_last_until_the_next_request(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("trainer.generate.device", lambda name: CPU)
    archives: list[Path] = []
    for name, kind in (("one", "lora"), ("two", "loha")):  # as a training through Cog hands them back
        run = made(tiny_base, tmp_path, name, kind, "TOK")
        archives.append(tmp_path / f"{name}.tar")
        with tarfile.open(archives[-1], "w") as tar:
            tar.add(run.args, "args.json")
            tar.add(run.export / f"{name}.safetensors", "lora.safetensors")
            tar.add(run.export / f"{name}_embedding.safetensors", "embeddings.safetensors")
    given = {
        "prompt": "a TOK", "negative_prompt": "", "lora_scale": 0.5, "num_outputs": 2, "num_inference_steps": 2,
        "guidance_scale": 3.0, "width": None, "height": None, "seed": 4,
    }  # fmt: skip
    monkeypatch.setenv("TEMPERA_BASE", str(tiny_base))
    loaded = serve_door.Loaded(None)
    drawn: list[list[bytes]] = []
    families: list[ModelFamily] = []
    for archive in itertools.chain(archives, archives[:1]):
        files = loaded.draw({**given, "replicate_weights": archive})
        assert [file.name for file in files] == ["0000_seed4.png", "0001_seed5.png"]
        drawn.append([Image.open(file).tobytes() for file in files])
        assert list((tmp_path / "temporary").iterdir()) == [files[0].parent]
        assert loaded._painter is not None  # pyright: ignore[reportPrivateUsage]
        families.append(loaded._painter.family)  # pyright: ignore[reportPrivateUsage]
    assert drawn[0] == drawn[2] != drawn[1]
    assert families[0] is families[1] is families[2]
    scratch.sweep()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_python_of_the_sampling_page_draws(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[1] / "docs" / "sampling.md"
    code = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    made(tiny_base, tmp_path / "runs", "mushroom", "lora", "TOK")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    painter, learned = names["painter"], names["learned"]
    painter.use([Weighted(learned, Strength(0.8, {"down": 0.5}))])
    (again,) = painter.draw(["a red TOK"], [3], Look(scheduler="euler_a"))
    assert names["pictures"][0].tobytes() == again.tobytes()
