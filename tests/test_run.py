"""Putting a run together: precision, the versions of pictures, what is cached."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer import cli, places, run
from trainer import engine as engine_module
from trainer.args import TrainArgs
from trainer.dataset import Tags, forms, load_mask, load_pixels, read_manifest
from trainer.engine import Engine
from trainer.events import Gradients
from trainer.hooks import Context, Hook
from trainer.loop import Run
from trainer.models.sd15 import SD15
from trainer.view import Augment, Version, label, sizes


def gradients(base: Path, pictures: Path, out: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Of the first update, before clipping."""
    tree = {
        "data": {"source": str(pictures)},
        "model": {"base": str(base), "dtype": dtype},
        "sample": {"strengths": []},
        "text": {"tokens": 1},
        "runtime": {"out": str(out), "name": dtype, "steps": 2, "batch_size": 2, "device": "cpu"},
    }
    with run.opened(cli.validate(tree)) as session:
        found: dict[str, torch.Tensor] = {}

        class Keep(Hook):
            def on_gradients(self, run: Run, event: Gradients) -> dict[str, float]:
                for named in run.components.values():
                    found.update(
                        {name: p.grad.clone() for name, p in named if event.update == 0 and p.grad is not None}
                    )
                return {}

        session.run.hooks = [Keep(Context(session.dir, session.args))]
        steps = list(session.steps())
        assert all(p.dtype == torch.float32 for named in session.run.components.values() for _, p in named)
    assert len(steps) == 2
    return found


@pytest.fixture(scope="module")
def exact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    from conftest import draw_pictures

    out = tmp_path_factory.mktemp("fp32")
    return gradients(tiny_base, draw_pictures(out / "pictures"), out, "fp32")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_gradients_of_every_precision_agree(
    exact: dict[str, torch.Tensor], tiny_base: Path, tiny_pictures: Path, tmp_path: Path, dtype: str
) -> None:
    rough = gradients(tiny_base, tiny_pictures, tmp_path, dtype)
    assert rough.keys() == exact.keys()
    one, two = (torch.cat([g[name].flatten() for name in exact]) for g in (exact, rough))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.98
    assert two.norm() / one.norm() == pytest.approx(1.0, abs=0.05)


def test_fp16_carries_gradients_that_half_precision_cannot_hold() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    engine = Engine(cli.validate({"data": {"source": "x"}, "runtime": {"device": "cpu"}}).runtime, "fp16")
    engine.watch(parameter)
    for _ in range(2):  # two micro-batches add up
        engine.backward((parameter.half().float() * 1e-8).sum())
    engine.release()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == pytest.approx([2e-8] * 3, rel=0.02)


@pytest.mark.parametrize(("given", "width", "expected"), [(None, 8, 1), (None, 64, 3), (2, 8, 2)])
def test_a_small_denoiser_has_one_thread_unless_a_number_was_given(
    monkeypatch: pytest.MonkeyPatch, given: int | None, width: int, expected: int
) -> None:
    monkeypatch.setattr(engine_module, "SMALL", 1000)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    runtime = cli.validate({"data": {"source": "x"}, "runtime": {"device": "cpu", "threads": given}}).runtime
    engine = Engine(runtime, "fp32")
    engine.suit(torch.nn.Linear(width, width))
    assert torch.get_num_threads() == expected
    engine.release()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_the_loss_scale_of_fp16_adapts_as_torchs_does_and_is_kept() -> None:
    """GradScaler halves at once and doubles after 2000 sound updates; its own arithmetic is asked, on the CPU."""
    runtime = cli.validate({"data": {"source": "x"}, "runtime": {"device": "cpu"}}).runtime
    engine, torchs = Engine(runtime, "fp16"), torch.amp.GradScaler("cpu", backoff_factor=0.5)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    sound = [False, False, *[True] * 2001, False, *[True] * 2000]
    for finite in sound:
        assert engine.settled(finite)
        torchs.scale(weight.sum() * (1.0 if finite else torch.inf)).backward()
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.register_hook(lambda gradient: scales.append(gradient.item()))
    scales: list[float] = []
    engine.backward(parameter.sum())
    assert scales == [torchs.get_scale()]
    other = Engine(runtime, "fp16")
    other.load_state_dict(engine.state_dict())
    other.backward(parameter.sum())
    assert scales[0] == scales[1] == 2.0**15
    for _ in range(15):
        assert other.settled(False)
    assert not other.settled(False), "at a scale of 1 there is nothing to lower"
    plain = Engine(runtime, "fp32")
    assert plain.settled(True)
    assert not plain.settled(False)
    assert not plain.state_dict()
    engine.release()


def augmented(base: Path, pictures: Path, out: Path) -> dict[str, object]:
    for picture in sorted(pictures.glob("*.png"))[:3]:
        mask = Image.new("L", Image.open(picture).size, 60)
        mask.paste(255, (4, 4, 24, 20))
        mask.save(picture.with_suffix(".mask.png"))
    (pictures / "dog_02.txt").write_text("a TOK beside a Sign")
    return {
        "data": {
            "source": str(pictures),
            "flip": True,
            "masks": True,
            "augment": {"variants": 2, "colour": 0.3, "crop": 0.2},
        },
        "model": {"base": str(base)},
        "sample": {"strengths": [], "steps": 1},
        "runtime": {"out": str(out), "name": "run", "steps": 2, "batch_size": 2, "device": "cpu"},
    }


def test_pictures_are_shown_as_their_versions_are_and_written_signs_are_not_mirrored(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = cli.validate(augmented(tiny_base, tiny_pictures, tmp_path / "out"))
    with caplog.at_level(logging.INFO), run.opened(args) as session:
        assert "never mirrored, as a caption has a word of data.keep_sides: dog_02\n" in caplog.text
        family, data = session.run.family, session.run.dataset
        items = {item.name: item for item in read_manifest(session.dir.dataset)}
        augment = Augment(2, colour=0.3, crop=0.2, seed=args.runtime.seed)
        known: dict[str, tuple[Version, torch.Tensor]] = {}
        for item in items.values():
            for version in augment.versions(item, mirrored=True):
                with torch.no_grad():
                    latent = family.encode_images(load_pixels(item, version)[None])[0]
                known[label(item.name, version.number, mirrored=version.mirrored)] = version, latent
        seen: set[str] = set()
        for index in range(100):
            samples = data.micro(index)
            assert samples.mask is not None
            assert samples.sizes is not None
            for row, name in enumerate(samples.names):
                own = {at: pair for at, pair in known.items() if at.split(".")[0] == name}
                (at,) = (at for at, (_, latent) in own.items() if torch.equal(latent, samples.latents[row]))
                seen.add(at)
                mask = load_mask(items[name], family.latent_scale, own[at][0])
                whole = torch.ones_like(samples.mask[row])
                torch.testing.assert_close(samples.mask[row], whole if mask is None else mask)
                assert samples.sizes[row].tolist() == list(sizes(items[name], own[at][0]))
        assert seen == {name for name in known if not name.startswith("dog_02") or "mirrored" not in name}
        shards = {path.name.split("..")[0] for path in (session.dir.cache / "latents").iterdir()}
        assert shards == {"dog_00", "dog_00.mask"}


def test_captions_are_encoded_once_before_training_and_a_resume_encodes_nothing(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    pixels: list[torch.Size] = []
    encode, encode_images = SD15.encode, SD15.encode_images
    monkeypatch.setattr(SD15, "encode", lambda self, captions: asked.extend(captions) or encode(self, captions))
    monkeypatch.setattr(SD15, "encode_images", lambda self, x: pixels.append(x.shape) or encode_images(self, x))
    args = cli.validate(augmented(tiny_base, tiny_pictures, tmp_path / "out"))
    with run.opened(args) as session:
        assert sorted(asked) == sorted({"", *(item.caption for item in read_manifest(session.dir.dataset))})
        assert len(pixels) == 5 * 6 - 3
        assert all(len(shape) == 4 and shape[0] == 1 for shape in pixels)
        asked.clear()
        pixels.clear()
        session.run.encode(["a caption that comes later"])
    with run.resumed(session.dir.root) as session:
        session.run.encode(["a caption that comes later"])
        session.run.encode([""])
        assert asked == ["a caption that comes later"]
        assert not pixels


@pytest.mark.parametrize("variants", [0, 1, 3])
def test_shuffled_captions_are_cached_once_their_forms_are_few(
    variants: int, tiny_base: Path, tiny_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, text in enumerate(sorted(tiny_pictures.glob("*.txt"))):
        text.write_text(f"a TOK, red, green, blue, star {n}", encoding="utf-8")
    asked: list[str] = []
    encode = SD15.encode
    monkeypatch.setattr(SD15, "encode", lambda self, captions: asked.extend(captions) or encode(self, captions))
    tree = {
        "data": {"source": str(tiny_pictures), "shuffle_tags": True, "caption_variants": variants},
        "model": {"base": str(tiny_base)},
        "runtime": {"out": str(tmp_path / "out"), "name": "run", "steps": 10, "batch_size": 2, "device": "cpu"},
    }
    with run.opened(cli.validate(tree)) as session:
        before = len(asked)
        tags, items = Tags(shuffle=True, variants=variants), read_manifest(session.dir.dataset)
        assert len(items) == 5
        expected = {form for item in items for form in forms(item, tags, 0)} | {""}
        assert sorted(asked) == sorted(expected if variants else [])
        assert len(expected) > 3 * variants
        for index in range(10):
            captions = session.run.dataset.micro(index).captions
            assert torch.equal(
                session.run.encode(captions).hidden,
                torch.cat([encode(session.run.family, [caption]).hidden for caption in captions]),  # type: ignore[arg-type]
            )
        assert (len(asked) == before) == bool(variants)


def test_captions_that_hardly_any_step_shows_are_not_encoded_before_training(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    for n, text in enumerate(sorted(tiny_pictures.glob("*.txt"))):
        text.write_text(f"a TOK, red, green, blue, star {n}", encoding="utf-8")
    tree = {
        "data": {"source": str(tiny_pictures), "tag_dropout": 0.5, "caption_variants": 100},
        "model": {"base": str(tiny_base)},
        "runtime": {"out": str(tmp_path / "out"), "name": "run", "steps": 3, "batch_size": 2, "device": "cpu"},
    }
    with run.opened(cli.validate(tree)) as session:
        assert not (session.dir.cache / "text").exists()
        session.run.encode(session.run.dataset.micro(0).captions)
    assert len(list((session.dir.cache / "text").iterdir())) == 1


def test_what_is_here_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a resume from another folder finds the models that captions, masks and larger pictures came from."""
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "plain", "words.json", "captioner", "detector", "segmenter", "seeker", "enlarger"):
        (tmp_path / name).mkdir()
    mask = {
        "sources": ["detect", "person", "text"],
        "detect": {"base": "detector", "labels": ["dog"]},
        "person": {"base": "segmenter"},
        "text": "a hat",
        "base": "seeker",
    }
    given = {
        "source": "pictures",
        "regularisation": {"source": "plain"},
        "captioner": "clip",
        "caption_model": {"base": "captioner", "vocabulary": "words.json"},
        "masks": True,
        "mask": mask,
        "upscale": {"by": "swin2sr", "base": "enlarger"},
    }
    data = places.located(TrainArgs.model_validate({"data": given})).data
    found = [data.source, data.regularisation.source, data.caption_model.base, data.caption_model.vocabulary]
    found += [data.mask.detect.base, data.mask.person.base, data.mask.base, data.upscale.base]
    names = ["pictures", "plain", "captioner", "words.json", "detector", "segmenter", "seeker", "enlarger"]
    assert found == [str(tmp_path / name) for name in names]
    assert data.mask.detect.labels == ("dog",)
    given["mask"] = {**mask, "person": {"base": "owner/model", "revision": "v1"}}
    assert places.located(TrainArgs.model_validate({"data": given})).data.mask.person.base == "owner/model"


def test_each_of_several_sources_is_found_again_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "cat.zip").touch()
    for given in ("dog | cat.zip|https://example.org/a.zip", '["dog", "cat.zip", "https://example.org/a.zip"]'):
        data = places.located(TrainArgs.model_validate({"data": {"source": given}})).data
        assert json.loads(data.source) == [
            str(tmp_path / "dog"),
            str(tmp_path / "cat.zip"),
            "https://example.org/a.zip",
        ]
    alone = places.located(TrainArgs.model_validate({"data": {"source": "dog"}})).data.source
    assert alone == str(tmp_path / "dog")
