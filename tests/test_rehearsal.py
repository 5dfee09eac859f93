"""--dry-run of training: it tells what the run then does, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer import rehearsal
from trainer.__main__ import main
from trainer.args import TrainArgs
from trainer.cli import CommandError, parse
from trainer.run import RunError, opened


def tree(base: Path, source: Path, out: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(source), "resolution": 32},
        "model": {"base": str(base)},
        "sample": {"steps": 1, "every": 1},
        "runtime": {"out": str(out), "batch_size": 2, "accumulate": 2, "device": "cpu"},
    }


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_it_tells_of_the_run_and_leaves_nothing(
    tmp_path: Path, tiny_base: Path, tiny_pictures: Path, scratch: Path
) -> None:
    args = TrainArgs.model_validate(tree(tiny_base, tiny_pictures, tmp_path / "runs"))
    Image.new("RGB", (96, 32), "red").save(tiny_pictures / "wide.png")
    count = len(list(tiny_pictures.glob("*.png")))
    found = rehearsal.rehearse(args)
    assert not (tmp_path / "runs").exists()
    assert not list(scratch.iterdir())
    facts = "\n".join(found.facts)
    assert f"{count} pictures, 0 left out" in facts
    assert "300 steps of 4 pictures" in facts
    assert [problem for problem in found.problems if problem.startswith("wide.png: ")]
    cost = re.search(r"about (\S+) s to prepare, (\S+) s a step and (\S+) (s|min) for all steps", facts)
    assert cost
    assert float(cost[2]) > 0
    memory = re.search(r"(\d+) MiB of memory", facts)
    assert memory
    assert 100 < int(memory[1]) < 20_000  # this process, with torch and the tests in it


def test_the_time_of_a_step_is_measured_on_the_largest_bucket(
    tmp_path: Path, tiny_base: Path, tiny_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(6):
        Image.new("RGB", (40, 20), (40 * index, 0, 90)).save(tiny_pictures / f"flat{index}.png")
    settings = tree(tiny_base, tiny_pictures, tmp_path) | {"adapter": {"rank": 2}}
    seen: list[tuple[int, int, int]] = []
    real = rehearsal.train

    def train(run: Any, start: int) -> Any:
        seen.append((start, run.steps, len(run.hooks)))
        return real(run, start)

    monkeypatch.setattr(rehearsal, "train", train)
    with opened(TrainArgs.model_validate(settings)) as session:
        before = {name: p.detach().clone() for name, p in session.run.components["adapter"]}
        assert rehearsal._seconds(session.run) > 0
        ((start, steps, hooks),) = seen
        assert (steps, hooks) == (start + 3, 0)
        sizes = [session.run.dataset.micro(i).latents.numel() for i in range(40)]
        assert session.run.dataset.micro(start * 2).latents.numel() == max(sizes) > min(sizes)
        assert any(not p.equal(before[name]) for name, p in session.run.components["adapter"])  # they were real


def test_by_hand(
    tmp_path: Path, tiny_base: Path, tiny_pictures: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["object", str(tiny_pictures), "--dry-run", f"--model.base={tiny_base}", f"--runtime.out={tmp_path / 'r'}"]
    words += ["--data.resolution=32", "--runtime.device=cpu", "--text.tokens=0"]
    words += ["--optim.rules", '[{"match": "mid_block", "lr_scale": 0.5}]']
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "steps of" in said
    assert re.search(r"rule mid_block: rate times 0\.5: \d+ tensors: mid_block\.\S+, mid_block\.", said)
    (tiny_pictures / "bad.png").write_bytes(b"junk")
    assert main(words) == 1
    assert "problem: bad.png is left out" in capsys.readouterr().out
    assert main([*words, "--data.weights", "dogs=2"]) == 2
    assert "data.weights names the folder 'dogs'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    assert not list(scratch.iterdir())


def test_what_stops_a_run_stops_its_rehearsal(tmp_path: Path, tiny_base: Path, scratch: Path) -> None:
    settings = tree(tiny_base, tmp_path, tmp_path / "runs")
    settings["model"]["base"] = str(tmp_path / "nowhere")
    with pytest.raises((RunError, ValueError), match="nowhere"):
        rehearsal.rehearse(TrainArgs.model_validate(settings))
    assert not list(scratch.iterdir())


def test_a_dry_run_continues_nothing() -> None:
    with pytest.raises(CommandError, match="--dry-run tells of a new run"):
        parse(["--resume", "runs/x", "--dry-run"])
    assert parse(["object", "pictures", "--dry-run"]).dry_run
    assert not parse(["object", "pictures"]).dry_run
    with pytest.raises(CommandError, match="did you mean --dry-run"):
        parse(["object", "pictures", "--dry-rn"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert rehearsal._duration(seconds) == text
