"""The hook that exports the best checkpoint: its figures, what is exported, what a resumed run makes of it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel

from trainer import run
from trainer.args import TrainArgs
from trainer.hooks.best import Best
from trainer.loop import Run
from trainer.registry import PartError
from trainer.types import BaseModelError

PROMPTS = ["a red TOK", "a dog"]


def args(model: Path, pictures: Path, out: Path, **best: object) -> TrainArgs:
    return TrainArgs.model_validate(
        {
            "data": {"source": str(pictures), "resolution": 32, "caption": "a TOK"},
            "model": {"base": str(model)},
            "adapter": {"rank": 2},
            "sample": {"steps": 1, "prompts": PROMPTS, "strengths": [], "width": 32, "height": 32},
            "hooks": {"tensorboard": False, "best": {"pictures": 2, **best}},
            "runtime": {
                **{"out": str(out), "steps": 4, "batch_size": 2, "device": "cpu"},
                **{"checkpoint_every": 1, "keep_checkpoints": 9},
            },
        }
    )


def hook_of(session: run.Session) -> Best:
    return next(hook for hook in session.run.hooks if isinstance(hook, Best))


def exported(session: run.Session) -> dict[str, Tensor]:
    return safetensors.torch.load_file(session.dir.export / f"{session.args.runtime.name}.safetensors")


FIDELITY = {0: 0.0, 1: 0.3, 2: 0.9, 3: 0.5, 4: 0.4}
RETENTION = {0: 1.0, 1: 0.9, 2: 0.9, 3: 0.8, 4: 0.8}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look is the best."""

    def figures(self: Best, run: Run) -> dict[str, Tensor]:
        look = len(self._found) + 1
        values = {"fidelity": FIDELITY[look], "alignment": 1.0, "retention": RETENTION[look]}
        return {name: torch.full((2,), value) for name, value in values.items()}

    monkeypatch.setattr(Best, "_figures", figures)


def rows(file: Path) -> list[Any]:
    return json.loads(file.read_text(encoding="utf-8"))["looks"]


@pytest.mark.usefixtures("pretended")
def test_the_best_is_exported_and_the_run_goes_on_from_its_last(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    with run.opened(args(tiny_base, tiny_pictures, tmp_path)) as session:
        list(session.steps())
        last = {name: p.detach().clone() for name, p in session.run.components["adapter"]}
    second = safetensors.torch.load_file(session.dir.checkpoint(2) / "adapter.safetensors")
    fourth = safetensors.torch.load_file(session.dir.checkpoint(4) / "adapter.safetensors")
    ups = sorted(tensor.flatten().tolist() for name, tensor in exported(session).items() if "lora_up" in name)
    assert ups == sorted(t.flatten().tolist() for name, t in second.items() if "lora_B" in name)
    assert ups != sorted(t.flatten().tolist() for name, t in fourth.items() if "lora_B" in name)
    assert sorted(t.flatten().tolist() for t in last.values()) == sorted(t.flatten().tolist() for t in fourth.values())
    chosen = json.loads(session.dir.choice.read_text(encoding="utf-8"))
    assert chosen["best"] == 2
    assert [look["score"] for look in chosen["looks"]] == pytest.approx(
        [statistics.harmonic_mean([FIDELITY[n], 1, RETENTION[n]]) for n in (1, 2, 3, 4)], abs=1e-4
    )
    assert chosen["sure"] == 1
    assert "step 2, the best by hooks.best" in session.dir.report.read_text(encoding="utf-8")


@pytest.mark.usefixtures("pretended")
def test_a_resumed_run_chooses_as_one_that_was_not_stopped(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    with run.opened(args(tiny_base, tiny_pictures, tmp_path / "a")) as whole:
        list(whole.steps())
    with run.opened(args(tiny_base, tiny_pictures, tmp_path / "b")) as session:
        steps = session.steps()
        for _ in range(3):
            next(steps)
    with run.resumed(session.dir.root) as session:
        list(session.steps())
    assert rows(session.dir.choice) == rows(whole.dir.choice)
    one, two = exported(session), exported(whole)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_figures_are_what_the_hook_says_of_pictures_and_texts(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = CLIPModel.from_pretrained(tiny_base / "clip", dtype=torch.float32).eval()
    processor = CLIPImageProcessor.from_pretrained(tiny_base / "clip")
    with run.opened(args(tiny_base, tiny_pictures, tmp_path)) as session:
        steps = session.steps()
        next(steps)
        hook = hook_of(session)
        assert (hook.prompts, hook.ordinary, hook.plain) == (["a red TOK"], ["a dog"], ["a red"])
        drawn: list[list[Image.Image]] = []
        pictures = hook._clip.pictures

        def remember(images: list[Image.Image]) -> Tensor:
            drawn.append(images)
            return pictures(images)

        monkeypatch.setattr(hook._clip, "pictures", remember)
        figures = hook._figures(session.run)
        files = [Image.open(name).convert("RGB") for name in hook.context.pictures]
        ids = session.run.family.tokenizers["text_encoder"](
            ["a red"],
            padding="max_length",
            max_length=clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
    with torch.no_grad():
        text = F.normalize(clip.get_text_features(input_ids=ids).pooler_output, dim=-1)

        def features(images: list[Image.Image]) -> Tensor:
            assert processor.size == {"height": 16, "width": 16}
            pixels = [
                torch.tensor(list(ImageOps.fit(i, (16, 16), Image.Resampling.BICUBIC).get_flattened_data()))
                for i in images
            ]
            shaped = torch.stack([p.reshape(16, 16, 3).permute(2, 0, 1).float() / 127.5 - 1 for p in pixels])
            return F.normalize(clip.get_image_features(pixel_values=shaped).pooler_output, dim=-1)

    reference = hook._reference
    torch.testing.assert_close(features(files), reference["own"], atol=0.03, rtol=0)
    concept, ordinary = (pictures(images) for images in drawn)
    centre = F.normalize(reference["own"].mean(0), dim=-1)
    least, most = (reference["drawn"] @ centre).mean(), (reference["own"] @ centre).mean()
    want = {
        "fidelity": ((concept @ centre).mean() - least) / max(most - least, 1e-3),
        "alignment": (concept @ text[0]).mean() / max((reference["drawn"] @ text[0]).mean(), 1e-3),
        "retention": F.cosine_similarity(ordinary, reference["ordinary"]).mean(),
    }
    assert {name: float(each.mean()) for name, each in figures.items()} == pytest.approx(
        {name: float(value) for name, value in want.items()}, abs=2e-4
    )
    assert [len(each) for each in figures.values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("second", "kept", "sure"),
    [([0.4, 0.4, 0.4, 0.9], 0.83, 1 - (3 / 4) ** 4), ([0.455] * 4, 0.83, 1.0), ([0.9] * 4, 0.81, 1.0)],
    ids=["by one picture of four, which a third of all draws miss", "by 0.011 of the score", "by fidelity alone"],
)
def test_a_checkpoint_that_is_not_clearly_better_is_not_exported(
    second: list[float],
    kept: float,
    sure: float,
    tiny_base: Path,
    tiny_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def figures(self: Best, run: Run) -> dict[str, Tensor]:
        fidelity, retention = (second, kept) if len(self._found) == 1 else ([0.45] * 4, 0.8)
        return {
            "fidelity": torch.tensor(fidelity),
            "alignment": torch.ones(4),
            "retention": torch.full((3,), retention),
        }

    monkeypatch.setattr(Best, "_figures", figures)
    with run.opened(args(tiny_base, tiny_pictures, tmp_path)) as session:
        list(session.steps())
    chosen = json.loads(session.dir.choice.read_text(encoding="utf-8"))
    assert max(chosen["looks"], key=lambda look: look["score"])["step"] == 2
    assert chosen["sure"] == pytest.approx(sure, abs=0.05)
    assert chosen["best"] == 4
    fourth = safetensors.torch.load_file(session.dir.checkpoint(4) / "adapter.safetensors")
    ups = sorted(tensor.flatten().tolist() for name, tensor in exported(session).items() if "lora_up" in name)
    assert ups == sorted(t.flatten().tolist() for name, t in fourth.items() if "lora_B" in name)


def test_what_it_cannot_judge_is_refused(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    plain = args(tiny_base, tiny_pictures, tmp_path, ordinary=["a TOK here"])
    with pytest.raises(PartError, match="names the trigger"), run.opened(plain):
        pass
    bare = args(tiny_base, tiny_pictures, tmp_path)
    bare = bare.model_copy(update={"sample": bare.sample.model_copy(update={"prompts": ("a TOK",)})})
    with pytest.raises(PartError, match="has none without it"), run.opened(bare):
        pass
    elsewhere = args(tiny_base, tiny_pictures, tmp_path, base=str(tmp_path))
    with pytest.raises(BaseModelError, match="needs a CLIPModel"), run.opened(elsewhere) as session:
        list(session.steps())
