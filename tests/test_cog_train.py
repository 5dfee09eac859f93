"""Cog's real server trains: what comes back, what is refused and how, and what a cancelled run leaves."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cog_server import ROOT, Server, Site, server, site
from conftest import draw_pictures
from diffusers import StableDiffusionPipeline
from hub_taking import Hub, taking
from PIL import Image
from safetensors.torch import load_file

from trainer import cog_schema

TOKEN = "hf_aSecretThatIsNowhere"
SCHEMA = cog_schema.schema((ROOT / "train.py").read_text(), (ROOT / "predict.py").read_text())["components"]["schemas"]

LARGE = """
from cog import BaseModel, Path
from trainer import scratch

class TrainingOutput(BaseModel):
    weights: Path
    hub: str | None = None

def train() -> TrainingOutput:
    file = scratch.folder() / "trained_model.tar"
    file.write_bytes(bytes(200_000_000))
    return TrainingOutput(weights=Path(file), hub=None)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with taking(TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def pages() -> Iterator[Site]:
    with site() as pages:
        yield pages


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, hub: Hub, tiny_base: Path) -> Iterator[Server]:
    """One server for all cases, as it serves one request after the other."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "TEMPERA_PRIVATE_URLS": "1",
    }
    with server(tmp_path_factory.mktemp("cog"), "train", **environment) as running:
        yield running


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("given") / "pictures")


@pytest.fixture(scope="module")
def packed(pictures: Path) -> bytes:
    return zipped(pictures)


def zipped(folder: Path) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return made.getvalue()


def tarred(folder: Path, *names: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, names[0] if names else file.name)
    return made.getvalue()


def data_url(content: bytes, kind: str = "application/zip") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def request(base: Path, **given: object) -> dict[str, object]:
    """A short training; `args` as a tree joins what makes it short."""
    short: dict[str, Any] = {"sample": {"steps": 1}, "hooks": {"tensorboard": False}, "runtime": {"device": "cpu"}}
    for section, options in dict(given.pop("args", {})).items():  # pyright: ignore
        short.setdefault(section, {}).update(options)
    small = {"steps": 2, "batch_size": 1, "lora_rank": 3, "resolution": 32, "base_model": str(base)}
    return {**small, "args": json.dumps(short), **given}


def failed(running: Server, given: dict[str, object]) -> str:
    """What a training that fails says."""
    running.wait("READY")
    status, answer = running.post("trainings", given)
    assert (status, answer["status"]) == (200, "failed"), answer
    said = answer["error"].rpartition("TrainingError: ")[2]  # or what Cog says of a URL that it could not fetch
    assert "\n" not in said
    return said


def trained(running: Server, given: dict[str, object]) -> dict[str, Any]:
    running.wait("READY")
    status, answer = running.post("trainings", given)
    assert (status, answer["status"]) == (200, "succeeded"), answer
    return answer


def unpacked(answer: dict[str, Any], folder: Path) -> Path:
    content = base64.b64decode(answer["output"]["weights"].split(",", 1)[1])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(folder, filter="data")
    return folder


# --- what comes back


def test_a_training_gives_files_for_everybody(
    trainer: Server, hub: Hub, tiny_base: Path, packed: bytes, tmp_path: Path
) -> None:
    """One training for all that can be seen of it: the tar, the log, metrics, the Hub, the temporary files."""
    given = request(tiny_base, input_images=data_url(packed), trigger_word="KIT", n_sample_imgs=2)
    answer = trained(trainer, {**given, "hf_repo_id": "me/kit", "hf_token": TOKEN})
    out = unpacked(answer, tmp_path / "out")

    names = {path.name for path in out.iterdir()}
    assert {"lora.safetensors", "embeddings.safetensors", "embeddings.pti", "special_params.json", "args.json",
            "captions", "grid.png", "samples", "README.md", "report.html"} <= names  # fmt: skip
    assert any(key.startswith("lora_unet_") for key in load_file(out / "lora.safetensors"))
    vectors = load_file(out / "embeddings.safetensors")["emb_params"]
    assert torch.equal(load_file(out / "embeddings.pti")["text_encoders_0"], vectors)
    assert json.loads((out / "special_params.json").read_text()) == {"KIT": "<s0><s1>"}
    assert (out / "captions/dog_00.txt").read_text() == "KIT, a red TOK on a white background\n"
    assert len(list((out / "samples").iterdir())) == 2
    args = json.loads((out / "args.json").read_text())
    assert (args["adapter"]["rank"], args["data"]["trigger"], args["data"]["resolution"]) == (3, "KIT", 32)
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for secret in (TOKEN, str(trainer.folder)):
        assert secret.encode() not in everything

    assert "step 2/2  loss " in answer["logs"]
    assert "left" in answer["logs"]
    assert "\r" not in answer["logs"]
    measured = answer["metrics"]["train"]
    assert (measured["step"], measured["of"]) == (2, 2)
    assert measured["loss"] > 0
    assert measured["lr"].keys() == {"adapter", "rows"}

    assert answer["output"]["hub"] == f"{hub.url}/me/kit/commit/c0"
    assert hub.private["me/kit"]
    assert hub.files["me/kit/lora.safetensors"] == (out / "lora.safetensors").read_bytes()
    assert hub.files["me/kit/README.md"] == (out / "README.md").read_bytes()
    assert TOKEN not in trainer.log.read_text()

    assert [Path(name).name for name in trainer.leftovers()] == ["trained_model.tar"]  # until the next request
    assert not list(trainer.kept.iterdir())
    failed(trainer, {})
    assert not trainer.leftovers()


def test_the_card_says_how_to_load_it(trainer: Server, tiny_base: Path, packed: bytes, tmp_path: Path) -> None:
    """And what it says about diffusers works."""
    out = unpacked(trained(trainer, request(tiny_base, input_images=data_url(packed))), tmp_path)
    card = (out / "README.md").read_text()
    for said in ("tags:", "widget:", 'instance_prompt: "TOK"', "(samples/00.png)", "`models/loras`", "<lora:lora:1>"):
        assert said in card
    code = card.partition("```python\n")[2].partition("```")[0]
    pipe = StableDiffusionPipeline.from_pretrained(str(tiny_base), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    before = pipe("a photo of <tok>", num_inference_steps=1, generator=torch.manual_seed(0), output_type="np").images
    where = {"pipe": pipe}
    for line in code.splitlines()[:-1]:  # the last draws
        exec(line.replace('"."', f'"{out}"').replace('inversion("', f'inversion("{out}/'), where)
    after = pipe("a photo of <tok>", num_inference_steps=1, generator=torch.manual_seed(0), output_type="np").images
    assert abs(before - after).max() > 1e-4
    assert '"a photo of <tok>"' in code


@pytest.mark.parametrize("how", ["", "moved/", "slow/"])
def test_pictures_come_from_anywhere(trainer: Server, pages: Site, tiny_base: Path, packed: bytes, how: str) -> None:
    pages.files["set.bin"] = packed  # told by content
    given = request(tiny_base, input_images=f"{pages.url}/{how}set.bin", steps=1, n_sample_imgs=1)
    assert "5 pictures" in trained(trainer, given)["logs"]


def test_a_tar_and_a_list_of_urls(trainer: Server, pages: Site, tiny_base: Path, pictures: Path) -> None:
    pages.files["set.tar"] = tarred(pictures)
    other = io.BytesIO()
    Image.new("RGB", (40, 40), "navy").save(other, "PNG")
    pages.files["two.png"] = other.getvalue()
    given = request(tiny_base, steps=1, n_sample_imgs=1, args={"adapter": {"alpha": 2}})
    args = base64.b64encode(str(given["args"]).encode()).decode()
    listed = json.dumps([f"{pages.url}/set.tar", f"{pages.url}/two.png"])
    answer = trained(trainer, {**given, "input_images": listed, "args": f"data:application/json;base64,{args}"})
    assert "6 pictures" in answer["logs"]
    pages.files["args.json"] = str(given["args"]).encode()
    trained(trainer, {**given, "input_images": f"{pages.url}/set.tar", "args": f"{pages.url}/args.json"})


# --- what is refused before anything runs


def bounds() -> list[tuple[str, object, str]]:
    """(name, value past a bound or of a wrong type, what is said)."""
    cases: list[tuple[str, object, str]] = []
    for name, one in SCHEMA["TrainingInput"]["properties"].items():
        if "minimum" in one:
            cases.append((name, one["minimum"] - 1, "minimum"))
        if "maximum" in one:
            cases.append((name, one["maximum"] + 1, "maximum"))
        kind = one.get("type")
        cases.append((name, {}, "not of type" if kind else "not "))
        if kind in ("integer", "number", "boolean"):
            cases.append((name, "yes", "not of type"))
    return [
        *cases,
        ("concept_mode", "statue", "not one of"),
        ("hf_repo_id", "no-slash", "match"),
        ("trigger_word", "", ""),
    ]


def test_every_input_past_its_bounds_is_named(trainer: Server) -> None:
    cases = bounds()
    assert len(cases) > 40
    for name, value, said in cases:
        status, answer = trainer.post("trainings", {name: value})
        assert status == 422, (name, value, answer)
        assert {tuple(detail["loc"]) for detail in answer["detail"]} == {("body", "input", name)}
        assert any(said in detail["msg"] for detail in answer["detail"]), (name, answer)


def test_every_input_at_its_bounds_passes(trainer: Server) -> None:
    """What is missing is said after the bounds were looked at."""
    for name, one in SCHEMA["TrainingInput"]["properties"].items():
        for value in {one[bound] for bound in ("minimum", "maximum") if bound in one}:
            assert "input_images is missing" in failed(trainer, {name: value})


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"a=1", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"input": []}, {}, 422),
        ({"input": {"webhook": 1}, "webhook_events_filter": ["never"]}, {}, 422),
    ],
)
def test_requests_that_are_none(trainer: Server, body: object, headers: dict[str, str], status: int) -> None:
    assert trainer.ask("POST", "/trainings", body, headers)[0] == status


# --- what fails, and what is said


def test_sources_that_cannot_be_used(trainer: Server, pages: Site, tiny_base: Path, pictures: Path) -> None:
    empty, text = io.BytesIO(), data_url(b"hello", "application/octet-stream")
    zipfile.ZipFile(empty, "w").close()
    words = io.BytesIO()
    with zipfile.ZipFile(words, "w") as archive:
        archive.writestr("a.txt", "only words")
    cut = data_url(zipped(pictures)[:-200])
    cases = [
        (text, "neither a folder nor a picture, zip or tar archive"),
        (data_url(empty.getvalue()), "picture"),
        (data_url(words.getvalue()), "picture"),
        (cut, "zip"),
        (f"{pages.url}/gone.zip", "404"),
        ("http://127.0.0.1:9/x.zip", "127.0.0.1"),
        ("/etc", "files of the server are not yours"),
        ("ftp://example.com/x.zip", "http"),
    ]
    for source, said in cases:
        assert said in failed(trainer, request(tiny_base, input_images=source)), source
    assert not trainer.leftovers()
    assert not list(trainer.kept.iterdir())


def test_inputs_that_contradict_or_are_not_the_callers(trainer: Server, tiny_base: Path, packed: bytes) -> None:
    url = data_url(packed)
    cases: list[tuple[dict[str, object], str]] = [
        ({"trigger_word": "A", "token_string": "B"}, "two names for one thing"),
        ({"steps": 1, "max_train_steps": 2}, "two names for one thing"),
        ({"resolution": "12,large"}, "data.resolution"),
        ({"args": "{"}, "args is not JSON"),
        ({"args": '{"adapter": {"rnak": 3}}'}, "did you mean adapter.rank?"),
        ({"args": '{"adapter": {"rank": 4}}'}, "lora_rank is 3"),
        ({"args": '{"adapter": {"kind": "/tmp/evil.py:X"}}'}, "would import code"),
        ({"args": '{"data": {"private_urls": true}}'}, "are for the operator"),
        ({"captioner": "evil:X"}, "would import code"),
        ({"hf_repo_id": "me/kit"}, "go together"),
        ({"hf_repo_id": "me/kit", "hf_token": "wrong"}, "cannot be written to"),
        ({"base_model": "nobody/nothing"}, "nobody/nothing"),
        ({"optimizer": "adamx"}, "adam"),
        ({"learning_rate": -1}, "greater than 0"),
        ({"resume_from": "20990101-000000-aaaaaa"}, "nor a run that this server kept"),
        ({"resume_from": "../../etc"}, "nor a run that this server kept"),
    ]
    for given, said in cases:
        whole = {"input_images": url, **request(tiny_base), **given}
        if "resume_from" in given:
            whole = given
        assert said in failed(trainer, whole), given
    assert not trainer.leftovers()
    assert not list(trainer.kept.iterdir())


def test_a_loss_that_is_no_number(trainer: Server, tiny_base: Path, packed: bytes) -> None:
    said = failed(trainer, request(tiny_base, input_images=data_url(packed), learning_rate=1e30, steps=8))
    assert "is not finite at step" in said
    assert "Lower the learning rate" in said


def test_a_webhook_hears_of_a_failure_with_its_traceback(trainer: Server, pages: Site, tiny_base: Path) -> None:
    pages.posted.clear()
    given = request(tiny_base, input_images=data_url(b"hello"))
    trainer.wait("READY")
    more = {"webhook": f"{pages.url}/hook", "webhook_events_filter": ["completed"]}
    assert trainer.post("trainings", given, **more)[1]["status"] == "failed"
    deadline = time.monotonic() + 120
    while not pages.posted:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert pages.posted[-1]["status"] == "failed"
    assert "Traceback" in pages.posted[-1]["logs"]


# --- a run that does not end


def started(running: Server, name: str, given: dict[str, object]) -> None:
    running.wait("READY")
    status, _ = running.ask("PUT", f"/trainings/{name}", {"input": given}, {"Prefer": "respond-async"})
    assert status == 202


def until(running: Server, name: str, given: dict[str, object], said: str) -> dict[str, Any]:
    """The state of a running training once its log or its metrics have `said`; PUT on a running id gives it."""
    deadline = time.monotonic() + 120
    while True:
        state = running.ask("PUT", f"/trainings/{name}", {"input": given}, {"Prefer": "respond-async"})[1]
        if said in json.dumps([state.get("logs"), state.get("metrics")]):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(0.02)


def cancelled(running: Server, name: str) -> None:
    assert running.ask("POST", f"/trainings/{name}/cancel")[0] == 200
    running.wait("READY")


def test_cancelled_while_it_trains_and_gone_on_with(
    trainer: Server, pages: Site, tiny_base: Path, packed: bytes, tmp_path: Path
) -> None:
    """By the name that the server kept it under, or by a tar of it: the same bits as without a break."""
    given = request(tiny_base, input_images=data_url(packed), steps=40, checkpointing_steps=5, seed=3)
    whole = unpacked(trained(trainer, given), tmp_path / "whole")
    for turn in ("name", "tar"):
        started(trainer, f"c{turn}", given)
        until(trainer, f"c{turn}", given, "step_000005")
        assert trainer.post("trainings", given)[0] == 409
        cancelled(trainer, f"c{turn}")
        failed(trainer, {})  # waits for the end of an update that took long
        assert not trainer.leftovers()
        (kept,) = trainer.kept.iterdir()
        assert list((kept / "lora/checkpoints").glob("step_*"))
        resume = kept.name
        if turn == "tar":
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w") as tar:
                tar.add(kept, kept.name)
            pages.files["run.tar"] = made.getvalue()
            resume = f"{pages.url}/run.tar"
        assert "lora_rank" not in (said := failed(trainer, {"resume_from": resume, "concept_mode": "face"}))
        assert "concept_mode" in said
        assert "cannot change adapter.rank (was 3, now 4)" in failed(trainer, {"resume_from": resume, "lora_rank": 4})
        unpacked(trained(trainer, {"resume_from": resume}), tmp_path / turn)
        for name in ("lora.safetensors", "embeddings.safetensors"):  # whose headers may tell of times
            one, other = (load_file(folder / name) for folder in (whole, tmp_path / turn))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
        if turn == "tar":
            shutil.rmtree(kept)
        assert not list(trainer.kept.iterdir())


def test_cancelled_while_it_downloads_or_draws(trainer: Server, pages: Site, tiny_base: Path, packed: bytes) -> None:
    pages.files["set.zip"] = packed
    pages.asked.clear()
    stuck = request(tiny_base, input_images=json.dumps([f"{pages.url}/stuck/set.zip", f"{pages.url}/set.zip"]))
    started(trainer, "d", stuck)
    assert pages.asked.wait(120)
    cancelled(trainer, "d")
    drawing = request(tiny_base, input_images=data_url(packed), args={"sample": {"steps": 1000}})
    started(trainer, "s", drawing)
    until(trainer, "s", drawing, "5 pictures, step 0")
    time.sleep(0.3)
    cancelled(trainer, "s")
    answer = trained(trainer, request(tiny_base, input_images=data_url(packed), steps=1, n_sample_imgs=1))
    assert "step 1/1" in answer["logs"]
    for kept in trainer.kept.iterdir():  # of the second: its pictures are prepared
        shutil.rmtree(kept)


@pytest.mark.parametrize("member", ["../escaped", "/tmp/escaped", "run/args.json"])
def test_tars_that_are_no_run(trainer: Server, tmp_path: Path, member: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a").write_text("{}")
    tar = data_url(tarred(tmp_path / "x", member), "application/x-tar")
    assert "resume_from cannot be used" in failed(trainer, {"resume_from": tar})
    assert not list(trainer.kept.iterdir())
    assert not trainer.leftovers()


def test_a_push_that_fails_loses_nothing(trainer: Server, hub: Hub, tiny_base: Path, packed: bytes) -> None:
    hub.full = True
    given = request(tiny_base, input_images=data_url(packed), steps=1, n_sample_imgs=1)
    output = trained(trainer, {**given, "hf_repo_id": "me/full", "hf_token": TOKEN})["output"]
    assert output["weights"].startswith("data:")
    assert "were not pushed to me/full" in output["hub"]


def curls() -> list[str]:
    """The commands of the README that train."""
    shell = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    found = [command for block in shell for command in re.findall(r"^curl (?:.*\\\n)*.*$", block, re.MULTILINE)]
    return [command for command in found if "trainings" in command]


def test_the_commands_of_the_readme_work(trainer: Server, pages: Site, packed: bytes, tmp_path: Path) -> None:
    """But for the hosts, and how long they train."""
    hosted, own, plain = curls()
    pages.files["dog.zip"] = packed
    short = '"steps": 1, "n_sample_imgs": 1, "resolution": 32, '
    for command in (own, plain):
        said = command.replace("http://localhost:5000", f"http://127.0.0.1:{trainer.port}")
        said = said.replace("https://example.com", pages.url).replace(".venv/bin/python", sys.executable)
        quoted = short if command is own else short.replace('"', '\\"')
        said = said.replace('"input": {', '"input": {' + quoted).replace('\\"input\\": {', '\\"input\\": {' + quoted)
        said = said.replace("answer.json", str(tmp_path / "answer.json")).replace(
            " -s ", f" -s -o {tmp_path}/answer.json "
        )
        trainer.wait("READY")
        subprocess.run(["bash", "-ec", said], cwd=ROOT, check=True)
        assert json.loads((tmp_path / "answer.json").read_text())["status"] == "succeeded"
    (decode,) = re.findall("^sed .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(["bash", "-ec", decode], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "trained_model.tar") as tar:
        assert "lora.safetensors" in tar.getnames()
    pages.posted.clear()
    subprocess.run(["bash", "-ec", hosted.replace("https://api.replicate.com", pages.url)], check=True)
    (sent,) = pages.posted
    assert sent.keys() == {"destination", "input"}
    assert sent["input"].keys() <= SCHEMA["TrainingInput"]["properties"].keys()


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_that_a_checkpoint_had(tiny_base: Path, packed: bytes, tmp_path: Path) -> None:
    given = request(tiny_base, input_images=data_url(packed), steps=400, checkpointing_steps=3)
    with server(tmp_path / "cog", "train") as first:
        started(first, "k", given)
        until(first, "k", given, "step_000003")
        os.kill(first.worker(), signal.SIGKILL)
        first.wait("UNHEALTHY", "DEFUNCT")
        assert first.post("trainings", given)[0] in (409, 503)
    (kept,) = (tmp_path / "cog/kept").iterdir()
    with server(tmp_path / "cog", "train") as second:
        started(second, "r", {"resume_from": kept.name})
        state = until(second, "r", {"resume_from": kept.name}, "pictures, step ")
        assert int(re.findall(r"pictures, step (\d+) of 400", state["logs"])[0]) >= 3
        cancelled(second, "r")
        failed(second, {})
        (upload,) = second.leftovers()
        assert upload.endswith("file.zip"), "what Cog had written of the killed request's input, which is not ours"


@pytest.mark.slow
def test_a_large_answer_passes(tmp_path: Path) -> None:
    """200 MB through the same kind of output, from a door that trains nothing."""
    (tmp_path / "cog/src").mkdir(parents=True)
    (tmp_path / "cog/src/large.py").write_text(LARGE)
    (tmp_path / "cog/src/trainer").symlink_to(ROOT / "trainer")
    with server(tmp_path / "cog", "train", COG_TRAIN_TYPE_STUB="large.py:train") as large:
        status, answer = large.post("trainings", {})
    assert (status, answer["status"]) == (200, "succeeded")
    assert len(base64.b64decode(answer["output"]["weights"].split(",", 1)[1])) == 200_000_000
