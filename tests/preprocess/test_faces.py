"""Face mode from drawn faces: what is found, what captions become, where the crop goes, what the loss weighs."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faces import portrait
from PIL import Image

from trainer import cli
from trainer.args import TrainArgs
from trainer.dataset import load_mask, read_manifest
from trainer.objectives.denoise import Denoise
from trainer.run import opened
from trainer.types import Batch, Cond

pytest.importorskip("cv2")

SAID = {0: "a photo of a woman with red hair", 1: "a man before a wall", 2: "portrait of a girl", 3: "the boy smiles"}
NAMES = [f"face_{seed}" for seed in range(8)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight faces, four with captions, and one that is three times as tall as wide, with its face at the top."""
    folder = tmp_path_factory.mktemp("faces")
    path = folder / "faces.zip"
    with zipfile.ZipFile(path, "w") as file:
        for seed, name in enumerate(NAMES):
            picture = portrait(seed)[0]
            if seed == 7:
                tall = Image.new("RGB", (240, 720), picture.getpixel((2, 2)))
                tall.paste(picture)
                picture = tall
            picture.save(folder / "x.png")
            file.write(folder / "x.png", f"{name}.png")
            if seed in SAID:
                file.writestr(f"{name}.txt", SAID[seed])
    return path


def args_of(archive: Path, base: Path, out: Path, more: Mapping[str, Any] | None = None) -> TrainArgs:
    own = {
        "data": {"source": str(archive), "resolution": 64},
        "model": {"base": str(base)},
        "adapter": {"rank": 2},
        "sample": {"steps": 1, "prompts": ["a {trigger}"]},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "steps": 3, "batch_size": 2, "device": "cpu"},
    }
    return cli.validate(cli.merge([cli.preset("face"), own, dict(more or {})]))


def test_faces_are_found_named_cropped_to_and_trained(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    args = args_of(archive, tiny_base, tmp_path)
    assert not args.data.flip
    with opened(args) as session:
        items = {item.name: item for item in read_manifest(session.dir.dataset)}
        masks = {name: load_mask(item, 8) for name, item in items.items() if item.mask}
        assert set(items) == set(NAMES)
        assert len(masks) >= 6
        for seed, name in enumerate(NAMES):
            if items[name].mask:
                check_mask(items[name].mask, portrait(seed)[1])
        assert [items[name].caption for name in NAMES[:5]] == [
            "a photo of TOK with red hair", "TOK before a wall", "portrait of TOK", "TOK smiles", "a photo of TOK",
        ]  # fmt: skip
        assert items["face_7"].centering[1] < 0.2, "the crop goes up, to the face"
        losses = [step.loss for step in session.steps()]
        assert len(losses) == 3
        assert np.isfinite(losses).all()
        shown = session.run.dataset.micro(0)
        assert shown.mask is not None
        assert 0 < float(shown.mask.mean()) < 1


def check_mask(path: Path | None, face: tuple[float, float, float]) -> None:
    assert path is not None
    with Image.open(path) as picture:
        mask = np.asarray(picture.convert("L"))
    x, y, half = face
    assert mask[round(y), round(x)] > 250
    assert mask[:, 0].max() == mask[:, -1].max() == 0
    assert mask[min(round(y + 2 * half), len(mask) - 1)].max() < 10, "not the clothes"


def test_outside_a_face_the_loss_weighs_the_floor(archive: Path, tiny_base: Path, tmp_path: Path) -> None:
    """What is predicted outside moves the loss by its share of the weights, and not at all with a floor of 0."""
    with opened(args_of(archive, tiny_base, tmp_path, {"runtime": {"batch_size": 1}})) as session:
        run = session.run
        own = run.objective
        assert isinstance(own, Denoise)
        assert own.args.mask_floor == 0.1
        masked = (run.dataset.micro(index) for index in range(20))
        samples = next(found for found in masked if found.mask is not None and bool((found.mask == 0).any()))
        mask = samples.mask
        assert mask is not None

        def loss(floor: float, outside: float) -> float:
            args = own.args.model_copy(update={"mask_floor": floor, "min_snr_gamma": None})
            generator = torch.Generator().manual_seed(0)
            batch = Batch(samples.latents, run.encode(samples.captions), samples.names, generator, mask)

            def predict(xt: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
                return (mask == 0).expand_as(xt) * outside

            return float(Denoise(args, own.path, own.frozen)(predict, batch).total)

        moved = {floor: loss(floor, 3.0) - loss(floor, 0.0) for floor in (0.0, 0.1, 1.0)}
        assert moved[0.0] == 0
        assert moved[1.0] > 0.1
        share = {floor: floor / float((floor + (1 - floor) * mask).sum()) for floor in (0.1, 1.0)}
        assert moved[0.1] / moved[1.0] == pytest.approx(share[0.1] / share[1.0], rel=1e-4)
