"""The doors: every bad input is one sentence and exit status 2, a failed run 1, a stopped one 130; nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer import checkpoint, predict_door
from trainer.__main__ import main
from trainer.args import TrainArgs
from trainer.ranks import RanksError
from trainer.rundir import RunDir, read_jsonl

ROOT = Path(__file__).parents[1]
QUICK = [
    *("--runtime.steps", "4", "--runtime.batch_size", "2", "--runtime.checkpoint_every", "2"),
    *("--runtime.device", "cpu", "--sample.steps", "2", "--sample.prompts", "a red {trigger}", "--adapter.rank", "2"),
    *("--export.layouts", "kohya,diffusers,embedding"),
]


@pytest.fixture
def door(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> list[str]:
    """A command line that trains."""
    return [
        "object",
        str(tiny_pictures),
        "--model.base",
        str(tiny_base),
        "--runtime.out",
        str(tmp_path / "runs"),
        *QUICK,
    ]


@pytest.fixture(scope="module")
def done(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    from conftest import draw_pictures

    out = tmp_path_factory.mktemp("doors")
    pictures = draw_pictures(out / "pictures")
    assert main(["object", str(pictures), "--model.base", str(tiny_base), "--runtime.out", str(out), *QUICK]) == 0
    return RunDir(out / "run")


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# --- a run that works


def test_a_run_leaves_all_that_it_promises(done: RunDir) -> None:
    for path in (done.args, done.env, done.dataset, done.metrics, done.log, done.grid, done.report, done.tensorboard):
        assert path.exists(), path
    names = {"run.safetensors", "pytorch_lora_weights.safetensors", "run_embedding.safetensors", "README.md"}
    names |= {"run.png", "run_comfyui.json"}
    assert {path.name for path in done.export.iterdir()} == names
    args = TrainArgs.model_validate_json(done.args.read_text())
    assert (args.adapter.alpha, args.data.resolution) == (2.0, (32,)), "derived values are saved"
    assert args.sample.prompts == ("a red TOK",)
    env = json.loads(done.env.read_text())
    assert env["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{64}", env["base"]["denoiser"])
    assert "step 4/4" in done.log.read_text()


def test_the_report_is_one_file_with_everything(done: RunDir) -> None:
    page = done.report.read_text()
    assert "data:image/png;base64," in page
    assert "<svg" in page
    assert "export/run.safetensors" in page
    assert "ComfyUI" in page
    assert not re.search(r"(src|href)='(?!data:)", page), "nothing is fetched from elsewhere"


def test_args_json_fed_back_gives_the_same_run(done: RunDir, tmp_path: Path) -> None:
    assert main([str(done.args), "--runtime.out", str(tmp_path), "--runtime.name", "again"]) == 0
    one, two = (
        load_file(done.export / "run.safetensors"),
        load_file(tmp_path / "again" / "export" / "again.safetensors"),
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    before, after = (json.loads(path.read_text()) for path in (done.args, tmp_path / "again" / "args.json"))
    changed = {key for key in before["runtime"] if before["runtime"][key] != after["runtime"][key]}
    assert changed == {"name", "out"}
    assert {**before, "runtime": {}} == {**after, "runtime": {}}


def test_steps_are_derived_from_the_pictures(done: RunDir, door: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from trainer import run
    from trainer.dataset import read_manifest
    from trainer.models.sd15 import SD15

    args = TrainArgs.model_validate_json(done.args.read_text())
    args = args.model_copy(update={"runtime": args.runtime.model_copy(update={"steps": None})})
    family = SD15.load(args.model, torch.device("cpu"))
    items = read_manifest(done.dataset)
    resolved = run.resolve(args, family, items)
    assert resolved.runtime.steps == 300
    assert run.resolve(args, family, items * 4).runtime.steps == 600
    assert run.resolve(args, family, items * 40).runtime.steps == 2000
    assert run.resolve(resolved, family, items * 40) == resolved
    for tokens, curve in ((1, "adaptive"), (0, "constant")):
        own = {"data": {"source": "x"}, "text": {"tokens": tokens}}
        chosen = run.resolve(TrainArgs.model_validate(own), family, items).optim
        assert (chosen.adapter.curve, chosen.rows.curve) == (curve, curve)


def test_captions_are_the_prompts_of_last_resort(door: list[str], tmp_path: Path) -> None:
    at = door.index("--sample.prompts")
    assert main([*door[:at], *door[at + 2 :], "--data.trigger", "zwx", "--runtime.steps", "1"]) == 0
    args = TrainArgs.model_validate_json((tmp_path / "runs" / "run" / "args.json").read_text())
    assert len(args.sample.prompts) == 4
    assert all("zwx" in prompt for prompt in args.sample.prompts)


# --- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--data.source", "{tmp}/nowhere"], "does not exist"),
        (["--data.source", "{tmp}/empty"], "has no picture"),
        (["--data.source", "{tmp}/one"], "at least 2 are needed"),
        (["--data.source", "{tmp}/text.zip"], "neither a folder nor a picture, zip or tar"),
        (["--model.base", "{tmp}/empty"], "no model_index.json"),
        (["--model.base", "{tmp}/lora.safetensors"], "is a LoRA"),
        (["--model.base", "{tmp}/old.ckpt"], "is a pickle"),
        (["--model.family", "sd16"], "did you mean sd15?"),
        (["--adapter.kind", "lara"], "did you mean lora?"),
        (["--objective.kind", "denoize"], "did you mean denoise?"),
        (["--hooks.extra", "metrixs"], "did you mean metrics?"),
        (["--objective.t_max", "1200"], "objective.t_max is 1200"),
        (["--data.resolution", "16", "--adapter.rnak", "3"], "did you mean adapter.rank?"),
        (["--adapter.kind", "none", "--text.tokens", "0"], "nothing would be trained"),
        (["--data.masks"], "no picture of"),
        (["--runtime.device", "mps"], "runtime.device is mps"),
    ],
)
def test_bad_input(
    door: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "one" / "a.png")
    (tmp_path / "text.zip").write_text("hello")
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "lora.safetensors")
    assert main([*door, *(word.replace("{tmp}", str(tmp_path)) for word in change)]) == 2
    sentence = one_sentence(capsys)
    assert said in sentence
    assert sentence.startswith("train.py: error: ")
    assert not (tmp_path / "runs" / "run").exists(), "the name stays free for the next try"


def test_an_existing_run_is_never_touched(done: RunDir, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in done.root.rglob("*") if path.is_file()}
    out = done.root.parent
    assert main(["object", str(out / "pictures"), "--runtime.out", str(out), "--model.base", str(tiny_base)]) == 2
    assert "never overwritten" in one_sentence(capsys)
    assert {path: path.read_bytes() for path in done.root.rglob("*") if path.is_file()} == before


def test_a_corrupt_picture_is_named_and_skipped(
    door: list[str], tiny_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_pictures / "broken.png").write_bytes((tiny_pictures / "dog_00.png").read_bytes()[:60])
    assert main([*door, "--runtime.steps", "1"]) == 0
    assert "broken.png is left out" in capsys.readouterr().err
    run_dir = RunDir(tmp_path / "runs" / "run")
    assert [line["file"] for line in read_jsonl(run_dir.skipped)] == ["broken.png"]
    assert "broken.png" in run_dir.report.read_text()
    assert "broken.png is left out" in run_dir.log.read_text()


def test_resume_refuses_what_would_make_another_run(done: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    change = ["--runtime.steps", "9", "--adapter.rank", "3", "--sample.every", "2"]
    assert main(["--resume", str(done.root), *change]) == 2
    said = one_sentence(capsys)
    assert "adapter.rank (was 2, now 3)" in said
    assert "runtime.steps (was 4, now 9)" in said
    assert "sample" not in said
    assert main(["--resume", str(done.root.parent)]) == 2
    assert "is no run directory" in one_sentence(capsys)


def test_resume_refuses_another_base(
    done: RunDir, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    base, root = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_base, base)
    shutil.copytree(done.root, root)
    args = json.loads((root / "args.json").read_text())
    args["model"]["base"] = str(base)
    (root / "args.json").write_text(json.dumps(args))
    weights = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1e-3
    save_file(weights, base / "unet" / "diffusion_pytorch_model.safetensors")
    assert main(["--resume", str(root)]) == 2
    assert "the base has changed since this run began (denoiser differ)" in one_sentence(capsys)


# --- runs that fail or are stopped


def test_a_loss_that_is_not_finite_stops_the_run(
    door: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--optim.adapter.lr", "1e30", "--optim.adapter.curve", "constant", "--runtime.checkpoint_every", "1"]
    assert main([*door, *wild]) == 1
    said = one_sentence(capsys)
    assert re.search(r"is not finite at step [234] \(pictures: dog_0", said)
    assert "the newest good checkpoint is" in said
    assert RunDir(tmp_path / "runs" / "run").newest_checkpoint() is not None


def test_a_full_disk_keeps_the_last_good_checkpoint(
    door: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = checkpoint._write  # pyright: ignore

    def full(path: Path, data: bytes) -> None:
        if "step_000004" in str(path) and path.name.startswith("optim"):
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "_write", full)
        assert main(door) == 1
    said = one_sentence(capsys)
    assert "No space left on device" in said
    run_dir = RunDir(tmp_path / "runs" / "run")
    assert f"the newest good checkpoint is {run_dir.checkpoint(2)}" in said
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step_000002"]
    assert main(["--resume", str(run_dir.root)]) == 0, "and with room again it ends"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_any_other_file(
    door: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RunDir, "metrics", property(lambda _: Path("/dev/full")))
    monkeypatch.setattr("trainer.hooks.metrics.read_jsonl", lambda _: [])
    monkeypatch.setattr("trainer.hooks.metrics.atomic_write", lambda *_: None)
    assert main(door) == 1
    assert "the disk is full" in one_sentence(capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_makes_a_checkpoint_and_exits_130(
    door: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    stop = tmp_path / "stop.py"
    stop.write_text(
        "import os\nfrom trainer.hooks import Hook\n"
        "class Stop(Hook):\n"
        "    def on_gradients(self, run, event):\n"
        f"        if event.update == 2: os.kill(os.getpid(), {int(number)})\n"
        "        return {}\n"
    )
    before = signal.getsignal(number)
    assert main([*door, "--hooks.extra", f"{stop}:Stop"]) == 130
    run_dir = RunDir(tmp_path / "runs" / "run")
    assert run_dir.newest_checkpoint() == (3, run_dir.checkpoint(3))
    assert f"--resume {run_dir.root}" in one_sentence(capsys)
    assert signal.getsignal(number) is before, "handlers are put back"
    assert main(["--resume", str(run_dir.root), "--hooks.extra", "[]"]) == 0
    assert [line["step"] for line in read_jsonl(run_dir.metrics)] == [1, 2, 3, 4]


def test_ctrl_c_before_the_first_update(door: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("preprocess.build", impatient)
    assert main(door) == 130
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize(("status", "error"), [(130, KeyboardInterrupt()), (1, RanksError("rank 1 is lost"))])
def test_what_was_prepared_is_kept_when_the_user_or_a_lost_process_ends_the_run(
    status: int,
    error: BaseException,
    door: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def impatient(*_: object, **__: object) -> None:
        raise error

    run_dir = RunDir(tmp_path / "runs" / "run")
    with monkeypatch.context() as patched:
        patched.setattr("trainer.cache.cache_latents", impatient)
        assert main(door) == status
    assert f"go on with --resume {run_dir.root}" in capsys.readouterr().err
    prepared = {path: path.stat().st_mtime_ns for path in (run_dir.cache / "pictures").iterdir()}
    assert prepared
    assert main(["--resume", str(run_dir.root)]) == 0
    assert {path: path.stat().st_mtime_ns for path in prepared} == prepared


def test_a_run_killed_before_its_first_update_can_be_resumed(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["object", str(tiny_pictures), "--model.base", str(tiny_base), *QUICK, "--print-args"]) == 0
    run_dir = RunDir.create(tmp_path / "killed")
    run_dir.args.write_text(capsys.readouterr().out)
    assert main(["--resume", str(run_dir.root)]) == 0
    assert run_dir.newest_checkpoint() == (4, run_dir.checkpoint(4))
    assert main(["--resume", str(run_dir.root)]) == 0, "a finished run has nothing left to do"


# --- predict


def draw(*argv: str) -> int:
    try:
        return predict_door.main(argv)
    except SystemExit as error:
        return int(str(error.code))


def test_predict_draws_the_trainers_own_samples_from_a_run_and_from_its_files(
    done: RunDir, tiny_base: Path, tmp_path: Path
) -> None:
    same = ("--prompt", "a red TOK", "--seed", "1234", "--steps", "2", "--device", "cpu", "--out", str(tmp_path))
    assert draw("--weights", str(done.root), *same) == 0
    assert draw("--weights", str(done.export / "run.safetensors"), "--base", str(tiny_base), *same) == 0
    assert (
        draw("--weights", str(done.export / "pytorch_lora_weights.safetensors"), "--base", str(tiny_base), *same) == 0
    )
    assert draw("--weights", str(done.root), "0.5", "tokens=1", *same) == 0
    assert draw("--weights", str(done.root), *same, "--strength", "0.5") == 0
    drawn = [Image.open(path).convert("RGB").tobytes() for path in sorted(tmp_path.glob("*.png"))]
    assert len(drawn) == 5, "earlier pictures are kept"
    trained = {path.parent.name: Image.open(path).convert("RGB").tobytes() for path in done.samples.rglob("00_*.png")}
    for picture in drawn[:3]:
        assert difference(picture, trained["after_1"]) <= 1
    assert difference(drawn[3], trained["after_0.5"]) <= 1
    assert difference(drawn[3], trained["after_1"]) > 1
    assert difference(drawn[4], drawn[3]) > 1, "a weaker adapter's tokens are weaker, too"
    facts = json.loads(Image.open(sorted(tmp_path.glob("*.png"))[0]).info["tempera"])  # type: ignore[arg-type]
    assert facts["prompt"] == "a red TOK"
    assert facts["seed"] == 1234


def difference(a: bytes, b: bytes) -> int:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("{tmp}/x.pt", "older pickles are not read"),
        ("{tmp}/x.ckpt", "is a pickle"),
        ("{tmp}/x.bin", "older pickles are not read"),
        ("{tmp}/none.safetensors", "does not exist"),
        ("{tmp}/broken.safetensors", "is a pickle, which could run code when it is read, and no .safetensors file"),
        ("{tmp}", "is no run directory"),
        ("{tmp}/wide.safetensors", "do not fit a weight of [32, 32]"),
        ("{tmp}/deep.safetensors", "changes 1 layers that the base has not"),
        ("{tmp}/partly.safetensors", "changes 1 layers that the base has not"),
        ("{base}/vae/diffusion_pytorch_model.safetensors", "tensors that are not understood"),
    ],
)
def test_predict_refuses(
    weights: str, said: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("pt", "ckpt", "bin"):
        (tmp_path / f"x.{suffix}").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x02}q\x00.")
    there = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    absent = "down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q"
    for name, modules, width in (("wide", [there], 999), ("deep", [absent], 32), ("partly", [there, absent], 32)):
        tensors = {f"lora_unet_{module}.lora_down.weight": torch.zeros(2, width) for module in modules}
        tensors |= {f"lora_unet_{module}.lora_up.weight": torch.zeros(width, 2) for module in modules}
        tensors |= {f"lora_unet_{module}.alpha": torch.tensor(2.0) for module in modules}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    path = weights.replace("{tmp}", str(tmp_path)).replace("{base}", str(tiny_base))
    out = tmp_path / "out"
    assert draw("--weights", path, "--prompt", "a", "--out", str(out), "--base", str(tiny_base), "--device", "cpu") == 2
    sentence = one_sentence(capsys)
    assert said in sentence.replace("\n", " ")
    assert not out.exists()


def test_the_programs_themselves(tmp_path: Path) -> None:
    """train.py and predict.py as a person starts them, from another folder."""
    for program in ("train.py", "predict.py"):
        done = subprocess.run(
            [sys.executable, str(ROOT / program), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "[default: " in done.stdout
    bad = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "objct"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
